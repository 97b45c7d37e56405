"""Guidance of the base by the gradients of rewards."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.checks import (
    check_no_strength,
    check_random,
)
from stepfuse.fuse.rules.plan import FusionStep, Latents, Plan
from stepfuse.fuse.rules.product import Base


@dataclass(frozen=True)
class RewardGradientGuidance(Base):
    """x_s = (a draw of p_ref) + λ_k v Σ w_i g_i, g_i = ∇ r_i(x_0(x_t)) normalised over channels at each pixel
    (the RGG baseline of Diffusion Blend, arXiv:2505.18547), λ_k = min((1 + growth)^k - 1, 1).

    x_0 is the base's prediction, its noise held fixed, so the gradient goes through the decoder and the reward, not the
    network. k counts in units of a run of 50 steps, as published. Cost: one forward of the base, and for each objective
    whose weight is not 0 one decoding and one reward with their gradients. Needs differentiable rewards.

    Attributes:
        growth: 0.024 in the commands of the Diffusion Blend code.
    """

    growth: float = 0.024
    needs: ClassVar[str] = "gradients"

    def __post_init__(self) -> None:
        if not isinstance(self.growth, int | float) or not 0 < self.growth < float("inf"):
            raise ValueError(f"growth {self.growth!r}; expected a positive number")

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength, for the base is not tilted by λ here, and for a base without noise."""
        check_no_strength(plan, "rgg")
        check_random(plan, "rgg", "it moves a step by a multiple of its variance")
        return super().prepare(plan)

    def __call__(self, step: FusionStep) -> Gaussian:
        (prediction,) = step.predict([step.plan.base])
        gaussian = step.transition(prediction, step.variance(step.plan.base))
        return replace(gaussian, mean=gaussian.mean + self.shift(step, prediction, gaussian.variance))

    def shift(self, step: FusionStep, prediction: Latents, variance: Tensor) -> Latents:
        """λ_k v Σ w_i g_i."""
        clean, _ = step.plan.path.clean_and_noise(step.x_t, prediction, step.t)
        images = torch.arange(len(clean)) if step.rows is None else step.rows
        weights = step.plan.weights[step.number].to(clean)
        total = torch.zeros_like(clean)
        for place, score in enumerate(step.rewards):
            if bool((weights[place] != 0).any()):
                with torch.enable_grad():
                    x_0 = clean.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(score(x_0, images).sum(), x_0)
                g = functional.normalize(gradient, dim=1)
                total += weights[place].reshape(-1, *[1] * (clean.ndim - 1)) * g
        k = step.number * 50 / len(step.plan.steps)
        return min((1 + self.growth) ** k - 1, 1.0) * variance * total
