"""The images that a step trains on: drawn by the policy, scored, and given their advantages."""

from abc import abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic

import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.train.algorithm import Algorithm, Batch, StepGaussians
from stepfuse.train.checkpoints import Progress
from stepfuse.train.conditioning import prompt_order
from stepfuse.train.health import Health, diversity
from stepfuse.train.lora import step_gaussians
from stepfuse.train.rollout import D, Sampling, Trajectory, out_of_inference, sample_generator
from stepfuse.train.scoring import Scorer
from stepfuse.train.setup import Setup
from stepfuse.train.timesteps import learned_steps

ScoreLatents = Callable[[Latents, int], "Future[Float[Tensor, ' images']]"]


class RolloutAlgorithm(Algorithm[D]):
    """An algorithm that trains on denoising steps of images that the policy draws."""

    @abstractmethod
    def collect(
        self, sampling: Sampling, conditioning: Conditioning, generators: list[torch.Generator], score: ScoreLatents
    ) -> Trajectory[D]:
        """Roll out one micro-batch; `score(latents, copies)` gives future rewards of `copies` latents per prompt."""

    def advantages(
        self,
        rewards: Float[Tensor, "all terms"],
        weights: Float[Tensor, " terms"],
        groups: Int[Tensor, " all"],
        prompts: Sequence[str],
        history: MutableMapping[str, list[float]],
    ) -> Float[Tensor, " all"] | None:
        """Advantages of all samples of a step; None if the algorithm does not use them.

        Args:
            rewards: Final rewards of all processes' samples. A weighted reward has a column for each of its terms,
                which sum to it; any other has one.
            weights: Weight of each term.
            groups: Group of each sample: the samples of one prompt of this step.
            prompts: Prompt of each sample.
            history: Rewards of earlier steps by prompt, which is updated.
        """
        return None

    def assign_advantages(self, trajectory: Trajectory[D], advantages: Float[Tensor, " batch"]) -> Trajectory[D]:
        """The trajectory with the advantages of its samples."""
        return trajectory

    def source(self, setup: Setup, progress: Progress, health: Health) -> "Rollouts[D]":
        return Rollouts(setup=setup, algorithm=self, history=progress.prompt_rewards, health=health)

    def gaussians(
        self, policy: nn.Module, sampling: Sampling, steps: Sequence[D], conditioning: Conditioning
    ) -> Sequence[StepGaussians]:
        return step_gaussians(policy, sampling.denoiser, sampling.schedule, steps, conditioning)


@dataclass(frozen=True, kw_only=True)
class Rollouts(Generic[D]):
    """Images drawn by the policy, of which every process draws its share.

    Every image has an index in the step, from 0, and a generator that depends on seed, step and index only; so numbers
    do not depend on the number of processes, nor on micro-batches.

    Attributes:
        history: rewards of earlier steps by prompt, which advantages may need.
    """

    setup: Setup
    algorithm: RolloutAlgorithm[D]
    history: dict[str, list[float]]
    health: Health

    def collect(self, step: int) -> tuple[list[Batch[D]], dict[str, float]]:
        """This process's micro-batches of one step, and values that were measured over all processes."""
        setup, settings, accelerator = self.setup, self.setup.settings, self.setup.accelerator
        groups = [i // self.algorithm.group_size for i in range(setup.total_batch_size)]
        order = prompt_order(settings.seed, len(setup.prompts), step, groups[-1] + 1)
        prompts = [setup.prompts[order[group]] for group in groups]
        sampling = setup.current_sampling(learned=learned_steps(settings, setup.sampling, step))
        drawn: list[tuple[slice, Trajectory[D]]] = []
        rewards: list[Future[Tensor]] = []
        scorers: list[Scorer] = []
        for indices in setup.micro_batches():
            rows = slice(indices.start, indices.stop)
            generators = [sample_generator(settings.seed, "rollout", step, i) for i in indices]
            scorer = Scorer(setup.reward, setup.backbone, prompts[rows], step)
            scorers.append(scorer)
            conditioning = setup.embed(prompts[rows])
            with accelerator.autocast(), torch.inference_mode(not setup.engine.partitioned):
                trajectory = self.algorithm.collect(sampling, conditioning, generators, scorer)
            trajectory = out_of_inference(trajectory)
            rewards.append(scorer.terms(trajectory.latents))  # scored while the next is sampled
            drawn.append((rows, trajectory))
        all_rewards = accelerator.gather(torch.cat([future.result() for future in rewards]))
        finite = torch.isfinite(all_rewards).all(1)
        if self.health.skips and (bad := gather_object([prompt for scorer in scorers for prompt in scorer.faulty])):
            self.health.not_finite("a reward that is not finite", step + 1, bad)
        index = torch.tensor(groups, device=all_rewards.device)
        images = accelerator.gather(torch.cat([scorer.thumbnails for scorer in scorers]))
        spread = diversity(images, index if self.algorithm.group_size > 1 else index * 0)
        self.health.measure_diversity(spread, step + 1, settings.min_diversity)
        weights = setup.reward.term_weights()
        advantages = self.algorithm.advantages(all_rewards, weights, index, prompts, self.history)
        batches = []
        for rows, trajectory in drawn:
            if advantages is not None:
                trajectory = self.algorithm.assign_advantages(trajectory, advantages[rows])
            batches.append(Batch(prompts=prompts[rows], trajectory=trajectory))
        mean = all_rewards[finite].sum(1).mean().item() if bool(finite.any()) else float("nan")
        return batches, {"reward": mean, "diversity": spread}
