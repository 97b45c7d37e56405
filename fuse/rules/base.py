"""What a fusion rule is, and what several of them share."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.plan import FusionStep, Latents, Plan


class FusionRule(Protocol):
    """How the experts of a step become the Gaussian that is sampled.

    `prepare` sees the whole run before anything is sampled: it refuses what the rule cannot do, naming the remedy,
    and may rewrite the plan. Calling the rule fuses one step.

    A rule may have attributes that say what it needs of the sampler, which then sees to it before `prepare`: `needs`,
    "rewards" or their "gradients"; `merges`, adapters that can be merged by "weights" or by "factors"; `gate`, the
    set's gap profile.
    """

    def prepare(self, plan: Plan) -> Plan: ...

    def __call__(self, step: FusionStep) -> Gaussian: ...


def average(predictions: Sequence[Latents], exponents: Float[Tensor, "experts batch"]) -> Latents:
    """Σ a_i e_i."""
    a = exponents.to(predictions[0]).reshape(len(predictions), -1, *[1] * (predictions[0].ndim - 1))
    return (a * torch.stack(list(predictions))).sum(0)


def average_variance(step: FusionStep) -> Tensor:
    """Σ a_i v_i + (1 - Σ a_i) v_ref, one an image."""
    a = step.exponents.to(step.x_t).reshape(step.plan.base + 1, -1, *[1] * (step.x_t.ndim - 1))
    return sum((a[i] * step.variance(i) for i in step.used), torch.zeros(()).to(step.x_t))
