"""Soups: one network with the adapters merged."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.base import average_variance
from stepfuse.fuse.rules.checks import (
    check_average_variance,
)
from stepfuse.fuse.rules.plan import FusionStep, Plan


@dataclass(frozen=True)
class Soup:
    """One network with the LoRA Σ a_i B_i A_i, exactly (Rewarded Soup, arXiv:2306.04488); variance as `average_noise`.

    To first order in the LoRAs its prediction is that of `average_noise`. Weights may differ between the images of a
    batch. Cost: one forward. Needs no reward.
    """

    merges: ClassVar[str] = "weights"

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength whose average variance leaves [0, sigma_s²]."""
        check_average_variance(plan)
        return plan

    def __call__(self, step: FusionStep) -> Gaussian:
        weights = step.exponents[: step.plan.base]
        mixtures, which = torch.unique(weights, dim=1, return_inverse=True)
        lasting = mixtures.shape[1] == 1 and bool((step.plan.exponents == step.exponents).all())
        factors = self.merges == "factors"
        merges = [step.plan.merge(row, factors=factors, lasting=lasting) for row in mixtures.T.tolist()]
        predictions = step.predict_some(merges, [(which == i).nonzero().flatten() for i in range(len(merges))])
        return step.transition(sum(predictions, torch.zeros(()).to(step.x_t)), average_variance(step))


@dataclass(frozen=True)
class SoupFactors(Soup):
    """One network with the LoRA λ (Σ w_i B_i) (Σ w_i A_i): the factors averaged, as Diffusion Blend's code does.

    Not the average of the LoRAs: products of different objectives' factors come in. Kept because published numbers of
    "Rewarded Soup" come from it. Takes adapters of one rank and alpha. Cost: one forward. Needs no reward.
    """

    merges: ClassVar[str] = "factors"
