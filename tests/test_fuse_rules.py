"""From users' weights to exponents, and how far they may extrapolate."""

import math

import numpy as np
import pytest
import torch

from stepfuse.fuse.gaussian import Gaussian, product
from stepfuse.fuse.rules import RULES, blend_weights, get_rule, largest_strength

NAMES = ["aesthetic", "prompt", "compressed"]


def test_weights_become_columns_of_sum_one():
    columns = blend_weights(
        [{"aesthetic": 2, "prompt": 1, "compressed": 1}, {"prompt": 0.3}, {"aesthetic": 3, "compressed": -1}], NAMES
    )
    expected = [[0.5, 0, 1.5], [0.25, 1, 0], [0.25, 0, -0.5]]
    torch.testing.assert_close(columns, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_order_of_the_mapping_does_not_matter():
    given = {"compressed": 1.0, "aesthetic": 3.0}
    assert blend_weights([given], NAMES).squeeze().tolist() == [0.75, 0, 0.25]


def test_an_unknown_objective_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'astetic'; this set has aesthetic, prompt, compressed"):
        blend_weights([{"aesthetic": 1.0}, {"astetic": 1.0}], NAMES)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match="not all finite"):
        blend_weights([{"aesthetic": 1.0, "prompt": weight}], NAMES)


@pytest.mark.parametrize("given", [{}, {"prompt": 0.0}, {"prompt": -1.0}, {"aesthetic": 1.0, "prompt": -2.0}])
def test_weights_without_a_positive_sum_are_refused(given):
    with pytest.raises(ValueError, match="expected a positive sum"):
        blend_weights([{"aesthetic": 1.0}, given], NAMES)


def test_rules_go_by_name():
    assert get_rule("product") is RULES["product"]
    with pytest.raises(ValueError, match="no fusion rule 'sum'; expected one of product"):
        get_rule("sum")


def test_the_product_rule_is_the_product():
    gaussians = [
        Gaussian(mean=torch.tensor([[m]], dtype=torch.float64), variance=torch.tensor([[0.0]])) for m in (1.0, 4.0)
    ]
    # In the limit v_i = r_i v the weights are (0.5 / 0.25, 0.5 / 1) = (2, 0.5), normalised (0.8, 0.2).
    fused = get_rule("product")(gaussians, torch.full((2, 1), 0.5, dtype=torch.float64), torch.tensor([0.25, 1.0]))
    assert fused.mean.item() == pytest.approx(0.8 * 1 + 0.2 * 4, rel=1e-12)


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
