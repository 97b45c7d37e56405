"""What a step learns from: micro-batches rolled out and credited, shared out over the processes by prompt."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor

from stepfuse.fuse.diffusion.variance import VarianceSchedule, step_variance
from stepfuse.train.algorithms import RolloutAlgorithm, Sampling
from stepfuse.train.conditioning import Embeddings, prompt_order
from stepfuse.train.health import Health, diversity
from stepfuse.train.rollout import Trajectory, out_of_inference, sample_generator
from stepfuse.train.scoring import Scorer, TrainingReward
from stepfuse.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: what is learned from, and the prompt of each row."""

    prompts: Sequence[str]
    trajectory: Trajectory


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Images drawn by the policy.

    Every image has a place in the step, from 0, and generators of its own derived from seed, step and place; so numbers
    do not depend on how many processes share the places, nor on micro-batches.
    """

    settings: TrainSettings
    algorithm: RolloutAlgorithm
    accelerator: Accelerator
    pipeline: DiffusionPipeline
    sampling: Sampling
    embed: Embeddings
    prompts: Sequence[str]
    reward: TrainingReward
    health: Health
    inference: bool
    history: dict[str, list[float]]  # rewards of earlier steps by prompt, as advantages may need them

    def collect(self, step: int, schedule: VarianceSchedule) -> tuple[list[Batch], dict[str, float]]:
        """This process's micro-batches of one step, and what was measured of all processes'."""
        settings, accelerator = self.settings, self.accelerator
        own = settings.train_batch_size * settings.gradient_accumulation_steps
        first = accelerator.process_index * own
        total = own * accelerator.num_processes
        groups = [i // self.algorithm.group_size for i in range(total)]
        order = prompt_order(settings.seed, len(self.prompts), step, groups[-1] + 1)
        prompts = [self.prompts[order[group]] for group in groups]
        sampling = dataclasses.replace(
            self.sampling, schedule=schedule, learned=learned_steps(settings, self.sampling, step)
        )
        drawn: list[tuple[slice, Trajectory]] = []
        rewards: list[Future[Tensor]] = []
        images: list[Tensor] = []
        scorers: list[Scorer] = []
        for start in range(first, first + own, settings.train_batch_size):
            rows = slice(start, start + settings.train_batch_size)
            generators = [sample_generator(settings.seed, "rollout", step, i) for i in range(rows.start, rows.stop)]
            scorer = Scorer(self.reward, self.pipeline, prompts[rows], step)
            scorers.append(scorer)
            conditioning = self.embed(prompts[rows])
            with accelerator.autocast(), torch.inference_mode(self.inference):
                trajectory = self.algorithm.collect(sampling, conditioning, generators, scorer)
            trajectory = out_of_inference(trajectory)
            rewards.append(scorer.terms(trajectory.latents))  # scored while the next is sampled
            images.append(scorer.thumbnails)
            drawn.append((rows, trajectory))
        everyone = accelerator.gather(torch.cat([future.result() for future in rewards]))
        finite = torch.isfinite(everyone).all(1)
        if self.health.skips and (bad := gather_object([prompt for scorer in scorers for prompt in scorer.faulty])):
            self.health.not_finite("a reward that is not finite", step + 1, bad)
        index = torch.tensor(groups, device=everyone.device)
        spread = diversity(accelerator.gather(torch.cat(images)), index if self.algorithm.group_size > 1 else index * 0)
        self.health.measure_diversity(spread, step + 1, settings.min_diversity)
        weights = self.reward.term_weights()
        advantages = self.algorithm.advantages(everyone, weights, index, prompts, self.history)
        batches = [
            Batch(
                prompts=prompts[rows],
                trajectory=self.algorithm.credit(trajectory, None if advantages is None else advantages[rows]),
            )
            for rows, trajectory in drawn
        ]
        mean = everyone[finite].sum(1).mean().item() if bool(finite.any()) else float("nan")
        return batches, {"reward": mean, "diversity": spread}


def learnable_steps(settings: TrainSettings, sampling: Sampling) -> list[int]:
    """Places of the denoising steps that can be learned from: random ones, after the first that are skipped."""
    like = torch.zeros(1, 1, 1, 1)
    path, schedule = sampling.denoiser.path, sampling.schedule
    return [
        place
        for place, (t, s) in enumerate(sampling.steps)
        if place >= settings.skip_first_steps and bool((step_variance(schedule, path, t, s, like) > 0).all())
    ]


def learned_steps(settings: TrainSettings, sampling: Sampling, step: int) -> frozenset[int]:
    """`train_timestep_fraction` of the learnable steps, drawn anew for each rollout, the same on every process.

    Gradients through some steps only, as Flow-GRPO-Fast (arXiv:2505.05470) and MixGRPO (arXiv:2507.21802) have them;
    here every step stays random, since fusion needs each transition of the policy.
    """
    places = learnable_steps(settings, sampling)
    if settings.train_timestep_fraction == 1:
        return frozenset(places)
    count = max(1, round(settings.train_timestep_fraction * len(places)))
    drawn = torch.randperm(len(places), generator=sample_generator(settings.seed, "timesteps", step))
    return frozenset(places[i] for i in drawn[:count].tolist())
