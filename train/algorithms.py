"""What sets DPO and DDPO apart: how a batch is rolled out, given credit, and scored by its loss."""

from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser, Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.train.credit import decoupled_advantages, group_advantages, tracked_advantages
from stepfuse.train.losses import ddpo_loss, dpo_loss
from stepfuse.train.rollout import (
    PairedStep,
    SampledStep,
    Step,
    Trajectory,
    branching_rollout,
    rollout,
    with_advantages,
)
from stepfuse.train.settings import DDPOSettings, DPOSettings

ScoreLatents = Callable[[Latents, int], "Future[Float[Tensor, ' images']]"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a rollout needs besides its prompts.

    Attributes:
        steps: of the path, noisiest first.
        shape: of one latent.
        learned: places of the steps that are learned from; None is all of them.
    """

    denoiser: Denoiser
    adapter: str | None
    schedule: VarianceSchedule
    steps: list[tuple[int, int]]
    shape: tuple[int, int, int]
    learned: frozenset[int] | None = None


class Algorithm(Protocol):
    """How one algorithm fills the loop.

    Attributes:
        name: what a record calls it.
        group_size: consecutive samples that share a prompt.
        updates_per_rollout: optimiser steps on one rollout.
        beta: weight of the KL in the loss; 0 where the loss holds it already.
        measures_kl: whether the KL of its Gaussians is that of denoising steps.
    """

    @property
    def name(self) -> str: ...

    @property
    def group_size(self) -> int: ...

    @property
    def updates_per_rollout(self) -> int: ...

    @property
    def beta(self) -> float: ...

    @property
    def measures_kl(self) -> bool: ...

    def temperature(self, dimensions: int) -> float:
        """Beta of the optimum p ∝ p_ref exp(r / beta) that the loss has, for densities of so many dimensions."""
        ...

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: Any) -> Float[Tensor, " batch"]:
        """One value a sample; the reference is None where `measures_kl` is False and no step has one."""
        ...


class RolloutAlgorithm(Algorithm, Protocol):
    """One that learns from images the policy draws."""

    def collect(
        self,
        sampling: Sampling,
        conditioning: Conditioning,
        generators: list[torch.Generator],
        score: ScoreLatents,
    ) -> Trajectory:
        """Roll out one micro-batch; `score(latents, copies)` will have the rewards of `copies` latents a prompt."""
        ...

    def advantages(
        self,
        rewards: Float[Tensor, "all terms"],
        weights: Float[Tensor, " terms"],
        groups: Int[Tensor, " all"],
        prompts: Sequence[str],
        history: MutableMapping[str, list[float]],
    ) -> Float[Tensor, " all"] | None:
        """Advantages of all samples of a step; None where the algorithm does not use them.

        Args:
            rewards: Final rewards of all processes' samples. A weighted reward has a column for each of its terms,
                which sum to it; any other has one.
            weights: Weight of each term.
            groups: Group of each sample: the samples of one prompt of this step.
            prompts: Prompt of each sample.
            history: Rewards of earlier steps by prompt, which is updated.
        """
        ...

    def credit(self, trajectory: Trajectory, advantages: Float[Tensor, " batch"] | None) -> Trajectory:
        """Give the samples of a trajectory their advantages."""
        ...


@dataclass(frozen=True)
class DPO:
    """Step-level DPO."""

    settings: DPOSettings
    name: str = "dpo"
    group_size: int = 1
    updates_per_rollout: int = 1
    beta: float = 0.0
    measures_kl: bool = True

    def collect(
        self,
        sampling: Sampling,
        conditioning: Conditioning,
        generators: list[torch.Generator],
        score: ScoreLatents,
    ) -> Trajectory:
        copies = self.settings.num_candidates
        return branching_rollout(
            sampling.denoiser,
            sampling.adapter,
            sampling.schedule,
            sampling.steps,
            conditioning,
            sampling.shape,
            generators,
            score_latents=lambda latents: score(latents, copies),
            candidates=copies,
            margin=self.settings.margin,
            learned=sampling.learned,
        )

    def advantages(
        self,
        rewards: Tensor,
        weights: Tensor,
        groups: Tensor,
        prompts: Sequence[str],
        history: MutableMapping[str, list[float]],
    ) -> None:
        return None

    def credit(self, trajectory: Trajectory, advantages: Tensor | None) -> Trajectory:
        return trajectory  # pairs were made during the rollout

    def temperature(self, dimensions: int) -> float:
        """With `mean` the loss has beta / D times the difference of log-densities."""
        return self.settings.beta / (dimensions if self.settings.log_prob_reduction == "mean" else 1)

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: Step) -> Tensor:
        assert isinstance(step, PairedStep)
        assert reference is not None
        scale = 1 / step.x_t[0].numel() if self.settings.log_prob_reduction == "mean" else 1.0
        values = dpo_loss(
            policy.log_prob(step.chosen) * scale,
            policy.log_prob(step.rejected) * scale,
            reference.log_prob(step.chosen) * scale,
            reference.log_prob(step.rejected) * scale,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            loss_type=self.settings.loss_type,
            clip_range=self.settings.train_clip_range,
        )
        return torch.where(step.kept, values, 0.0)


@dataclass(frozen=True)
class DDPO:
    """Policy gradient with an exact per-step KL to the base."""

    settings: DDPOSettings
    name: str = "ddpo"

    @property
    def measures_kl(self) -> bool:
        return self.settings.beta > 0

    @property
    def group_size(self) -> int:
        return self.settings.num_generations

    @property
    def updates_per_rollout(self) -> int:
        return self.settings.num_inner_epochs

    @property
    def beta(self) -> float:
        return self.settings.beta

    def collect(
        self,
        sampling: Sampling,
        conditioning: Conditioning,
        generators: list[torch.Generator],
        score: ScoreLatents,
    ) -> Trajectory:
        return rollout(
            sampling.denoiser,
            sampling.adapter,
            sampling.schedule,
            sampling.steps,
            conditioning,
            sampling.shape,
            generators,
            learned=sampling.learned,
            reference=self.measures_kl,
        )

    def advantages(
        self,
        rewards: Tensor,
        weights: Tensor,
        groups: Tensor,
        prompts: Sequence[str],
        history: MutableMapping[str, list[float]],
    ) -> Tensor:
        settings = self.settings
        groups = groups if settings.per_prompt_stat_tracking else torch.zeros_like(groups)
        scale, clip = settings.scale_rewards, settings.train_adv_clip_max
        finite = torch.isfinite(rewards).all(1)  # an image without a reward is not trained on
        rewards, groups = rewards[finite], groups[finite]
        if settings.multi_objective_aggregation == "normalize_then_sum":
            known = decoupled_advantages(rewards, weights, groups, scale=scale, clip=clip)
        elif settings.per_prompt_stat_tracking_buffer_size:
            known = tracked_advantages(
                rewards.sum(1),
                [prompt for prompt, has_reward in zip(prompts, finite.tolist(), strict=True) if has_reward],
                history,
                buffer_size=settings.per_prompt_stat_tracking_buffer_size,
                min_count=settings.per_prompt_stat_tracking_min_count,
                scale=scale,
                clip=clip,
            )
        else:
            known = group_advantages(rewards.sum(1), groups, scale=scale, clip=clip)
        advantages = rewards.new_zeros(len(finite))
        advantages[finite] = known
        return advantages

    def credit(self, trajectory: Trajectory, advantages: Tensor | None) -> Trajectory:
        assert advantages is not None
        return with_advantages(trajectory, advantages)

    def temperature(self, dimensions: int) -> float:
        """With `mean` the policy gradient is divided by D, and the KL is not."""
        return self.settings.beta * (dimensions if self.settings.log_prob_reduction == "mean" else 1)

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: Step) -> Tensor:
        assert isinstance(step, SampledStep)
        assert step.advantage is not None
        scale = 1 / step.x_t[0].numel() if self.settings.log_prob_reduction == "mean" else 1.0
        return ddpo_loss(
            policy.log_prob(step.x_s) * scale,
            step.log_prob * scale,
            step.advantage,
            clip_range=self.settings.train_clip_range,
        )
