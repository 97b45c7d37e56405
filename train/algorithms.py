"""Step-level DPO and DDPO, and the algorithms by name."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.train.advantages import decoupled_advantages, group_advantages, mixed_advantages, tracked_advantages
from stepfuse.train.algorithm import AlignmentAlgorithm, preference_loss
from stepfuse.train.collect import RolloutAlgorithm, ScoreLatents
from stepfuse.train.fused_sampling import Sampling, Weights
from stepfuse.train.losses import ddpo_loss
from stepfuse.train.offline import DiffusionDPO
from stepfuse.train.rollout import PairedStep, SampledStep, Trajectory, branching_rollout, rollout
from stepfuse.train.settings import DDPOSettings, DPOSettings


class DPO(RolloutAlgorithm[PairedStep]):
    """Step-level DPO: pairs are made during the rollout, and the loss contains the KL."""

    settings: DPOSettings
    name: ClassVar[str] = "dpo"

    def __init__(self, settings: DPOSettings) -> None:
        super().__init__(settings)
        self.margin = settings.margin

    def collect(
        self,
        sampling: Sampling,
        conditioning: Conditioning,
        generators: list[torch.Generator],
        weights: Weights,
        score: ScoreLatents,
    ) -> Trajectory[PairedStep]:
        candidates, margin = self.settings.num_candidates, self.settings.margin
        return branching_rollout(
            sampling, conditioning, generators, weights, score_latents=score, candidates=candidates, margin=margin
        )

    def kept(self, step: PairedStep) -> Tensor:
        return step.kept

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: PairedStep) -> Float[Tensor, " batch"]:
        assert reference is not None  # every stored step has one
        scale = self.log_prob_scale(step.x_t)
        log_probs = [p.log_prob(x) * scale for p in (policy, reference) for x in (step.chosen, step.rejected)]
        beta = to_device(self.beta(step.weights), log_probs[0].device, log_probs[0].dtype)
        loss = preference_loss(self.settings, beta, *log_probs)
        return torch.where(step.kept, loss, 0.0)


class DDPO(RolloutAlgorithm[SampledStep]):
    """Policy gradient with an exact per-step KL to the base."""

    settings: DDPOSettings
    name: ClassVar[str] = "ddpo"

    def __init__(self, settings: DDPOSettings) -> None:
        super().__init__(settings)
        self.group_size, self.updates_per_rollout = settings.num_generations, settings.num_inner_epochs
        self.adds_kl = self.measures_kl = any(each.beta > 0 for each in settings.each)

    def collect(
        self,
        sampling: Sampling,
        conditioning: Conditioning,
        generators: list[torch.Generator],
        weights: Weights,
        score: ScoreLatents,
    ) -> Trajectory[SampledStep]:
        return rollout(sampling, conditioning, generators, weights, reference=self.measures_kl)

    def advantages(
        self,
        rewards: Float[Tensor, "all terms"],
        weights: Float[Tensor, "all terms"],
        groups: Tensor,
        prompts: Sequence[str],
        history: MutableMapping[str, list[float]],
    ) -> Float[Tensor, " all"]:
        settings, scale, clip = self.settings, self.settings.scale_rewards, self.settings.train_adv_clip_max
        groups = groups if settings.per_prompt_stat_tracking else torch.zeros_like(groups)
        finite = torch.isfinite(rewards).all(1)  # an image without a reward is not trained on
        rewards, weights, groups = rewards[finite], weights[finite], groups[finite]
        if settings.objectives:
            known = mixed_advantages(rewards, weights, groups, scale=scale, clip=clip)
        elif settings.multi_objective_aggregation == "normalize_then_sum":
            known = decoupled_advantages(rewards, weights[0], groups, scale=scale, clip=clip)
        elif settings.per_prompt_stat_tracking_buffer_size:
            known = tracked_advantages(
                rewards.sum(1),
                list(compress(prompts, finite.tolist())),
                history,
                buffer_size=settings.per_prompt_stat_tracking_buffer_size,
                min_count=settings.per_prompt_stat_tracking_min_count,
                scale=scale,
                clip=clip,
            )
        else:
            known = group_advantages(rewards.sum(1), groups, scale=scale, clip=clip)
        return rewards.new_zeros(len(finite)).masked_scatter(finite, known)

    def assign_advantages(
        self, trajectory: Trajectory[SampledStep], advantages: Float[Tensor, " batch"]
    ) -> Trajectory[SampledStep]:
        steps = tuple(replace(step, advantage=advantages) for step in trajectory.steps)
        return replace(trajectory, steps=steps)

    def temperature(self, beta: float, dimensions: int) -> float:
        """With `log_prob_reduction: mean` the policy gradient is divided by the dimensions, and the KL is not."""
        return beta * (dimensions if self.settings.log_prob_reduction == "mean" else 1)

    def update_log_probs(self, step: SampledStep, policy: Gaussian) -> None:
        step.log_prob.copy_(policy.log_prob(step.x_s).detach())

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: SampledStep) -> Float[Tensor, " batch"]:
        assert step.advantage is not None  # assigned after the rollout
        scale = self.log_prob_scale(step.x_t)
        return ddpo_loss(
            policy.log_prob(step.x_s) * scale,
            step.log_prob * scale,
            step.advantage,
            clip_range=self.settings.train_clip_range,
        )


# By the `algorithm` of the settings.
ALGORITHMS: dict[str, Callable[[Any], AlignmentAlgorithm[Any]]] = {
    "dpo": DPO,
    "diffusion-dpo": DiffusionDPO,
    "ddpo": DDPO,
}
