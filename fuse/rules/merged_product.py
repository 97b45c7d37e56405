"""The product's Gaussian from the prediction of one merged network."""

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, Literal

import torch

from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.product import ProductLaw, fuse_predictions, soup_weights
from stepfuse.fuse.rules.step import FusionStep


class MergedProduct(ProductLaw):
    """`product` with an infinite gate, as adapters are trained through it; weights are 0 or more, at strength 1.

        e_i = e(Σ b_j B_j A_j) for every expert,    1/v* = Σ w_i / v_i,    m* = v* Σ w_i m_i / v_i

    with b of `soup_weights`. With one variance schedule for all adapters b is w, and this is `soup`.
    """

    name = "product"
    merges: ClassVar[Literal["weights"]] = "weights"

    def networks(self, step: FusionStep) -> Sequence[tuple[Network, Rows]]:
        return step.soups(soup_weights(step)[:-1])

    def combine(self, step: FusionStep, predictions: Sequence[Latents]) -> Gaussian:
        return fuse_predictions(step, step.used, [self.average(step, predictions)] * len(step.used))

    def average(self, step: FusionStep, predictions: Sequence[Latents]) -> Latents:
        return reduce(torch.add, predictions)
