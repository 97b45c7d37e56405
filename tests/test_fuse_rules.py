"""Fusion rules in closed form: names, what they refuse, lots drawn, and how far strengths may extrapolate."""

import math

import numpy as np
import pytest
import torch

from stepfuse.fuse.gaussian import Gaussian, product
from stepfuse.fuse.limits import largest_strength
from stepfuse.fuse.rules import Product, get_rule


def test_rules_go_by_name():
    assert isinstance(get_rule("product"), Product)
    with pytest.raises(ValueError, match="no fusion rule 'sum'; expected one of base, product"):
        get_rule("sum")


# How far a strength may go

WEIGHTS = torch.tensor([[0.6, 1.0, 0.0, 1.5], [0.4, 0.0, 1.0, -0.5]], dtype=torch.float64)
ANCESTRAL = 0.02  # any one number: it scales every variance of a step alike


def fuse(strength, column, relative_variances, reference):
    """The product at one strength: objectives with λ w_i, the base with 1 - λ."""
    gaussians = [
        Gaussian(
            mean=torch.full((1, 2), float(i), dtype=torch.float64),
            variance=torch.tensor([[r * ANCESTRAL]], dtype=torch.float64),
        )
        for i, r in enumerate([*relative_variances.tolist(), reference])
    ]
    return product(gaussians, torch.cat([strength * column, torch.tensor([1 - strength], dtype=torch.float64)]))


def is_valid(*args):
    """Whether the product exists; an error about anything but the precision is a failure."""
    try:
        fuse(*args)
    except ValueError as error:
        if "must be positive" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("r", "reference"), [((1.0, 0.64), 0.25), ((0.25, 0.64), 1.0), ((0.5, 0.5), 0.5), ((0.09, 1.0), 0.3)]
)
def test_the_largest_strength_is_where_a_scan_stops(r, reference):
    relative_variances = torch.tensor(r, dtype=torch.float64)
    limits = largest_strength(WEIGHTS, relative_variances, reference)
    for column, limit in zip(WEIGHTS.T, limits.tolist(), strict=True):
        for strength in np.linspace(0, 5, 101).tolist():
            assert is_valid(strength, column, relative_variances, reference) == (strength < limit)
        if math.isfinite(limit):
            assert is_valid(limit * (1 - 1e-9), column, relative_variances, reference)
            assert not is_valid(limit * (1 + 1e-9), column, relative_variances, reference)
        else:
            assert is_valid(1e6, column, relative_variances, reference)


def test_the_largest_strength_of_one_objective_by_hand():
    """1/v* = (1 - λ) / 0.25 + λ / 1 = 4 - 3 λ, which is positive up to λ = 4/3."""
    limit = largest_strength(torch.ones(1, 1, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64), 0.25)
    assert limit.item() == pytest.approx(4 / 3, rel=1e-14)
