"""Averages of predicted noises, and soups: one network with the adapters merged."""

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, Literal

import torch

from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.step import FusionStep


class AverageRule(FusionRule):
    """For rules whose prediction is an average: the variance is one too, v = Σ a_i v_i + (1 - Σ a_i) v_ref."""

    is_one_adapter = True

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength whose average variance leaves [0, sigma_s²] at some step."""
        like = torch.zeros(1, 1, dtype=torch.float64)
        for k, (t, s) in enumerate(plan.steps):
            average = (plan.exponents[k] * plan.relative_variances(plan.experts, k)[:, None]).sum(0)
            ancestral = plan.path.ancestral_variance(t, s, like).item()
            largest = plan.path.at(s, like)[1].item() ** 2
            outside = (average < -1e-9) | (average * ancestral > largest * (1 + 1e-6))
            if bool(outside.any()):
                image = int(outside.nonzero()[0])
                raise ValueError(
                    f"strength {plan.strength:g} with weights {plan.label(k, image)} averages the variances to "
                    f"{average[image].item() * ancestral:g} at step {k + 1} of {len(plan.steps)}, outside 0 to "
                    f"{largest:g}; use a strength nearer 1, or the rule product"
                )
        return plan

    def combine(self, step: FusionStep, predictions: Sequence[Latents]) -> Gaussian:
        """p(x_s | x_t) of the averaged prediction."""
        variance = step.weighted([step.variance(expert) for expert in step.used])
        return step.transition(self.average(step, predictions), variance)


class AverageNoise(AverageRule):
    """e = Σ a_i e_i + (1 - Σ a_i) e_ref, predicted noises averaged (DB-MPA, Diffusion Blend, arXiv:2505.18547).

    Published for one variance schedule. Where the objectives' differ, the step's variance is their average,
    v = Σ a_i v_i + (1 - Σ a_i) v_ref; where they are equal this is `product`. Cost: as `product`. Needs no reward.
    """

    name = "average_noise"
    summary = "Averages the noises that the adapters predict at every step."

    def networks(self, step: FusionStep) -> Sequence[tuple[Network, Rows]]:
        return step.used_networks(step.used)

    def average(self, step: FusionStep, predictions: Sequence[Latents]) -> Latents:
        return step.weighted(predictions)


class Soup(AverageRule):
    """One network with the LoRA Σ a_i B_i A_i, exactly (Rewarded Soup, arXiv:2306.04488); variance as `average_noise`.

    To first order in the LoRAs its prediction is that of `average_noise`. Weights may differ between the images of a
    batch. Cost: one forward. Needs no reward.
    """

    name = "soup"
    summary = "One network with the weighted sum of the LoRAs; the cheapest."
    merges: ClassVar[Literal["weights", "factors"]] = "weights"

    def networks(self, step: FusionStep) -> Sequence[tuple[Network, Rows]]:
        cacheable = bool((step.plan.exponents == step.exponents()[:, :1]).all())
        return step.soups(step.exponents(step.plan.adapters), self.merges, cacheable=cacheable)

    def average(self, step: FusionStep, predictions: Sequence[Latents]) -> Latents:
        return reduce(torch.add, predictions)


class SoupFactors(Soup):
    """One network with the LoRA λ (Σ w_i B_i) (Σ w_i A_i): the factors averaged, as Diffusion Blend's code does.

    Not the average of the LoRAs: products of different objectives' factors come in. Kept because published numbers of
    "Rewarded Soup" come from it. Takes adapters of one rank and alpha. Cost: one forward. Needs no reward.
    """

    name = "soup_factors"
    summary = "One network with the LoRAs' two factors averaged separately; to compare with published numbers."
    merges = "factors"
