"""Soups: one network with the adapters merged."""

from functools import reduce
from typing import ClassVar, Literal

import torch

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.rules.average_noise import AverageRule
from stepfuse.fuse.rules.step import FusionStep


class Soup(AverageRule):
    """One network with the LoRA Σ a_i B_i A_i, exactly (Rewarded Soup, arXiv:2306.04488); variance as `average_noise`.

    To first order in the LoRAs its prediction is that of `average_noise`. Weights may differ between the images of a
    batch. Cost: one forward. Needs no reward.
    """

    name = "soup"
    merges: ClassVar[Literal["weights", "factors"]] = "weights"

    def fuse(self, step: FusionStep) -> Gaussian:
        adapters = step.plan.adapters
        mixtures, which = torch.unique(step.exponents(adapters), dim=1, return_inverse=True)
        cacheable = bool((step.plan.exponents == step.exponents()[:, :1]).all())
        names = [adapter.name for adapter in adapters]
        networks = [
            Network.merged(dict(zip(names, weights, strict=True)), self.merges, cacheable=cacheable)
            for weights in mixtures.T.tolist()
        ]
        predictions = step.predict(networks, [(which == i).nonzero().flatten() for i in range(len(networks))])
        return self.gaussian(step, reduce(torch.add, predictions))


class SoupFactors(Soup):
    """One network with the LoRA λ (Σ w_i B_i) (Σ w_i A_i): the factors averaged, as Diffusion Blend's code does.

    Not the average of the LoRAs: products of different objectives' factors come in. Kept because published numbers of
    "Rewarded Soup" come from it. Takes adapters of one rank and alpha. Cost: one forward. Needs no reward.
    """

    name = "soup_factors"
    merges = "factors"
