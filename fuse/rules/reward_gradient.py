"""Guidance of the base by the gradients of rewards."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from stepfuse.data.devices import to_device
from stepfuse.data.settings_fields import setting
from stepfuse.fuse.diffusion.gaussian import Gaussian, per_sample
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.checks import check_from_base
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.step import FusionStep


@dataclass(frozen=True)
class RewardGradientGuidance(FusionRule):
    """x_s = (a draw of p_ref) + λ_k v Σ w_i g_i, g_i = ∇ r_i(x_0(x_t)) normalised over channels at each pixel
    (the RGG baseline of Diffusion Blend, arXiv:2505.18547), λ_k = min((1 + growth)^k - 1, 1).

    x_0 is the base's prediction, its noise held fixed, so the gradient goes through the decoder and the reward, not the
    network. k counts in units of a run of 50 steps, as published. Cost: one forward of the base, and for each objective
    whose weight is not 0 one decoding and one reward with their gradients. Needs differentiable rewards.
    """

    name = "rgg"
    summary = "Pushes the base's picture at every step in the direction that raises the rewards."
    needs = "gradients"

    growth: float = setting(0.024, "How fast the guidance grows; 0.024 in the commands of Diffusion Blend.", above=0)

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength, for the base is not tilted by λ here, and for a base without noise."""
        check_from_base(plan, self.name, "it moves a step by a multiple of its variance")
        return plan

    def fuse(self, step: FusionStep) -> Gaussian:
        (prediction,) = step.predict([step.plan.base.network])
        gaussian = step.transition(prediction, step.variance(step.plan.base))
        clean, _ = step.plan.path.clean_and_noise(step.x_t, prediction, step.t)
        total = torch.zeros_like(clean)
        for objective, score in zip(step.plan.objectives, step.rewards, strict=True):
            weight = step.weight(objective)
            if bool(weight.any()):
                with torch.enable_grad():
                    x_0 = clean.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(score(x_0, step.images).sum(), x_0)
                weight = to_device(weight, clean.device, clean.dtype)
                total += per_sample(weight, clean) * functional.normalize(gradient, dim=1)
        k = step.step_index * 50 / len(step.plan.steps)
        scale = min((1 + self.growth) ** k - 1, 1.0)
        return replace(gaussian, mean=gaussian.mean + scale * gaussian.variance * total)
