"""Fusion rules: from the Gaussians of the base and of the adapters to the one that is sampled."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.gaussian import Gaussian, product


class FusionRule(Protocol):
    """One method: fuse one step.

    Args:
        gaussians: one an expert; the base is among them where its exponent is not 0.
        exponents: a_i, one an expert and sample; they sum to 1 over the experts.
        relative_variances: r_i of each expert's schedule at this step.
    """

    def __call__(
        self,
        gaussians: Sequence[Gaussian],
        exponents: Float[Tensor, "experts batch"],
        relative_variances: Float[Tensor, " experts"],
    ) -> Gaussian: ...


def product_rule(
    gaussians: Sequence[Gaussian],
    exponents: Float[Tensor, "experts batch"],
    relative_variances: Float[Tensor, " experts"],
) -> Gaussian:
    """p* ∝ Π p_i^(a_i), the base holding 1 - Σ a_i over the objectives (MSDDA, arXiv:2604.14379).

    Cost: one conditional forward an objective and step, one more for guidance, one more for the
    base where the strength is not 1. Needs no reward.

    Raises:
        ValueError: for a fused precision that is not positive.
    """
    return product(gaussians, exponents, relative_variances=relative_variances)


RULES: dict[str, FusionRule] = {
    "product": product_rule,
}


def get_rule(name: str) -> FusionRule:
    """A rule by its name in `RULES`.

    Raises:
        ValueError: for a name that is not there.
    """
    if name not in RULES:
        raise ValueError(f"no fusion rule {name!r}; expected one of {', '.join(RULES)}")
    return RULES[name]


def largest_strength(
    weights: Float[Tensor, "objectives batch"],
    relative_variances: Float[Tensor, " objectives"],
    reference: float,
) -> Float[Tensor, " batch"]:
    """The supremum of λ for which the product's precision is positive at one step, one a sample.

    The precision is (1 - λ) / r_ref + λ Σ w_i / r_i in units of the ancestral variance, linear in λ.
    Infinite where every λ ≥ 0 is valid.
    """
    slope = (weights / relative_variances[:, None]).sum(0) - 1 / reference
    limit = -1 / (reference * slope)
    return torch.where(slope < 0, limit, torch.inf)


def blend_weights(weights: Sequence[Mapping[str, float]], names: Sequence[str]) -> Float[Tensor, "objectives batch"]:
    """Users' weights by objective name → columns that sum to 1, float64.

    Raises:
        ValueError: for an unknown objective, a weight that is not finite, or weights that do not
            have a positive sum.
    """
    table = torch.zeros(len(names), len(weights), dtype=torch.float64)
    for column, given in enumerate(weights):
        for name, weight in given.items():
            if name not in names:
                raise ValueError(f"weights name the objective {name!r}; this set has {', '.join(names)}")
            table[names.index(name), column] = weight
        if not bool(torch.isfinite(table[:, column]).all()):
            raise ValueError(f"weights {dict(given)} are not all finite; give each objective a number")
        if table[:, column].sum() <= 0:
            raise ValueError(f"weights {dict(given)} sum to {table[:, column].sum():g}; expected a positive sum")
    return table / table.sum(0)
