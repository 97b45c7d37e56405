"""The images that a step trains on: drawn by the policy, scored, and given their advantages."""

from abc import abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.train.algorithm import AlignmentAlgorithm, Batch, Source, StepGaussians
from stepfuse.train.checkpoints import Progress
from stepfuse.train.conditioning import prompt_order
from stepfuse.train.fused_sampling import Sampling, Weights
from stepfuse.train.health import Health, diversity
from stepfuse.train.mixtures import group_weights
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import D, Trajectory, out_of_inference, sample_generator
from stepfuse.train.scoring import Scorer
from stepfuse.train.settings import TrainSettings
from stepfuse.train.setup import Setup

ScoreLatents = Callable[[Latents], "Future[Float[Tensor, 'images objectives']]"]


class RolloutAlgorithm(AlignmentAlgorithm[D]):
    """An algorithm that trains on denoising steps of images that the policy draws."""

    @abstractmethod
    def collect(
        self,
        sampling: Sampling,
        conditioning: Conditioning,
        generators: list[torch.Generator],
        weights: Weights,
        score: ScoreLatents,
    ) -> Trajectory[D]:
        """Roll out one micro-batch; `score` gives future rewards of any number of consecutive latents per prompt."""

    def advantages(
        self,
        rewards: Float[Tensor, "all terms"],
        weights: Float[Tensor, "all terms"],
        groups: Int[Tensor, " all"],
        prompts: Sequence[str],
        history: MutableMapping[str, list[float]],
    ) -> Float[Tensor, " all"] | None:
        """Advantages of all samples of a step, of all processes; None if the algorithm does not use them.

        Args:
            rewards: final rewards, one column for each objective, or for each term of one weighted reward.
            weights: of these columns, for each sample.
            groups: the samples of one prompt of this step.
            history: rewards of earlier steps by prompt, which is updated.
        """
        return None

    def assign_advantages(self, trajectory: Trajectory[D], advantages: Float[Tensor, " batch"]) -> Trajectory[D]:
        """The trajectory with the advantages of its samples."""
        return trajectory

    def weights(self, step: D) -> Weights:
        return step.weights

    def step_index(self, step: D) -> int:
        return step.index

    def source(self, setup: Setup, progress: Progress, health: Health) -> Source[D]:
        return partial(collect_rollouts, setup, self, progress.prompt_rewards, health)

    def gaussians(
        self, policy: nn.Module, sampling: Sampling, steps: Sequence[D], conditioning: Conditioning
    ) -> Sequence[StepGaussians]:
        return step_gaussians(policy, sampling, steps, conditioning)


def learned_steps(settings: TrainSettings, learnable: list[int], step: int) -> frozenset[int]:
    """`train_timestep_fraction` of the learnable steps, drawn for each rollout, the same on every process.

    Gradients come from some steps only, as in Flow-GRPO-Fast (arXiv:2505.05470) and MixGRPO (arXiv:2507.21802); here
    every step stays random, since fusion needs each transition of the policy.
    """
    count = max(1, round(settings.train_timestep_fraction * len(learnable)))
    drawn = torch.randperm(len(learnable), generator=sample_generator(settings.seed, "timesteps", step))
    return frozenset(learnable[i] for i in drawn[:count].tolist())


def collect_rollouts(
    setup: Setup, algorithm: RolloutAlgorithm[D], history: dict[str, list[float]], health: Health, step: int
) -> tuple[list[Batch[D]], dict[str, float]]:
    """This process's micro-batches of images drawn by the policy, and their mean reward and diversity over all.

    Every image has an index in the step, from 0, and a generator that depends on seed, step and index only; so numbers
    do not depend on the number of processes, nor on micro-batches.
    """
    settings, accelerator = setup.settings, setup.accelerator
    groups = [i // algorithm.group_size for i in range(setup.total_batch_size)]
    order = prompt_order(settings.seed, len(setup.prompts), step, groups[-1] + 1)
    prompts = [setup.prompts[order[group]] for group in groups]
    mixtures = group_weights(settings, step // algorithm.updates_per_rollout, groups[-1] + 1)[groups]
    sampling = setup.current_sampling(learned=learned_steps(settings, setup.learnable, step))
    drawn: list[tuple[Scorer, Trajectory[D]]] = []
    rewards: list[Future[Tensor]] = []
    for indices in setup.micro_batches():
        generators = [sample_generator(settings.seed, "rollout", step, i) for i in indices]
        scorer = Scorer(setup.reward, setup.backbone, [prompts[i] for i in indices], step)
        conditioning = setup.embed(scorer.prompts)
        weights = mixtures[indices.start : indices.stop]
        with accelerator.autocast(), torch.inference_mode(not setup.engine.partitioned):
            trajectory = algorithm.collect(sampling, conditioning, generators, weights, scorer)
        trajectory = out_of_inference(trajectory)
        rewards.append(scorer.terms(trajectory.latents))  # scored while the next is sampled
        drawn.append((scorer, trajectory))
    scores, shown = (
        torch.cat(parts)
        for parts in ([future.result() for future in rewards], [scorer.thumbnails for scorer, _ in drawn])
    )
    all_rewards, images = gather_on_host(accelerator, scores, shown)
    for what in setup.reward.faults:
        if health.skips and (bad := gather_object([prompt for scorer, _ in drawn for prompt in scorer.faulty[what]])):
            health.not_finite(what, step + 1, bad)
    index = torch.tensor(groups)
    spread = diversity(images, index if algorithm.group_size > 1 else index * 0)
    health.measure_diversity(spread, step + 1, settings.min_diversity)
    columns = setup.reward.column_weights(mixtures).to(all_rewards)
    advantages = algorithm.advantages(all_rewards, columns, index, prompts, history)
    batches = []
    for indices, (scorer, trajectory) in zip(setup.micro_batches(), drawn, strict=True):
        if advantages is not None:
            own = to_device(advantages[indices.start : indices.stop], trajectory.latents.device)
            trajectory = algorithm.assign_advantages(trajectory, own)
        batch = Batch(prompts=scorer.prompts, steps=trajectory.steps, conditioning=trajectory.conditioning)
        batches.append(batch)
    return batches, mean_rewards(settings, all_rewards, mixtures) | {"diversity": spread}


def gather_on_host(
    accelerator: Accelerator, rewards: Float[Tensor, "own columns"], images: Float[Tensor, "own *shape"]
) -> tuple[Float[Tensor, "all columns"], Float[Tensor, "all *shape"]]:
    """Rewards and thumbnails of all processes, on the host, which waits once for them in a rollout."""
    columns = rewards.shape[1]
    gathered = accelerator.gather(torch.cat([rewards, images.flatten(1).to(rewards)], dim=1)).cpu()
    return gathered[:, :columns].contiguous(), gathered[:, columns:].unflatten(1, images.shape[1:]).contiguous()


def mean_rewards(settings: TrainSettings, rewards: Float[Tensor, "all columns"], weights: Weights) -> dict[str, float]:
    """The mean reward of a step; of several objectives that of each, over the images that have all weight on it.

    Without vertices among the weights it is that over all images.
    """
    finite = torch.isfinite(rewards).all(1)
    if len(settings.each) == 1:
        return {"reward": rewards[finite].sum(1).mean().item()}
    vertices = (weights == 1).to(finite.device) | (settings.vertex_share == 0)
    alone = {each.name: finite & vertices[:, i] for i, each in enumerate(settings.each)}
    return {
        f"reward/{name}": rewards[rows, i].mean().item() for i, (name, rows) in enumerate(alone.items()) if rows.any()
    }
