"""From users' words to weights: constant or over the steps, as text and as tables."""

import math

import pytest
import torch

from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import WeightSchedule, label_weights, lowest, parse_weights
from tests.fixtures_tiny import refused

NAMES = ["aesthetic", "prompt", "compressed"]


def test_weights_become_columns_of_sum_one():
    columns = weight_table(
        [{"aesthetic": 2, "prompt": 1, "compressed": 1}, {"prompt": 0.3}, {"aesthetic": 3, "compressed": -1}], NAMES
    )
    expected = [[0.5, 0, 1.5], [0.25, 1, 0], [0.25, 0, -0.5]]
    torch.testing.assert_close(columns[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_order_of_the_mapping_does_not_matter():
    given = {"compressed": 1.0, "aesthetic": 3.0}
    assert weight_table([given], NAMES).squeeze().tolist() == [0.75, 0, 0.25]


def test_an_unknown_objective_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'astetic'; this set has aesthetic, prompt, compressed"):
        weight_table([{"aesthetic": 1.0}, {"astetic": 1.0}], NAMES)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match="not all finite"):
        weight_table([{"aesthetic": 1.0, "prompt": weight}], NAMES)


@pytest.mark.parametrize("given", [{}, {"prompt": 0.0}, {"prompt": -1.0}, {"aesthetic": 1.0, "prompt": -2.0}])
def test_weights_without_a_positive_sum_are_refused(given):
    with pytest.raises(ValueError, match="expected a positive sum"):
        weight_table([{"aesthetic": 1.0}, given], NAMES)


# Over the steps.

HALVES = WeightSchedule(((0.9, 0, 0.5), (0.2, 0.5, 1)))


def test_a_step_belongs_to_the_piece_it_begins_in():
    """Of five steps the third begins at 2/5 < 0.5, the fourth at 3/5."""
    assert [HALVES.at(number, 5) for number in range(5)] == [0.9, 0.9, 0.9, 0.2, 0.2]


def test_outside_its_pieces_a_weight_is_0():
    assert [WeightSchedule(((1.0, 0.25, 0.5),)).at(number, 4) for number in range(4)] == [0, 1, 0, 0]


def test_weights_over_the_steps_sum_to_1_at_each():
    """a = 0.9 then 0.2 beside b = 0.6: 0.9 / 1.5 = 0.6, then 0.2 / 0.8 = 0.25."""
    table = weight_table([{"prompt": HALVES, "aesthetic": 0.6}], NAMES, steps=2)
    expected = torch.tensor([[[0.4], [0.6], [0]], [[0.75], [0.25], [0]]], dtype=torch.float64)
    torch.testing.assert_close(table, expected)


def test_a_step_that_no_weight_covers_is_named():
    with refused("prompt=1@0-0.5", "at step 3 of 4"):
        weight_table([{"prompt": WeightSchedule(((1.0, 0, 0.5),))}], NAMES, steps=4)


@pytest.mark.parametrize(
    ("pieces", "culprit"),
    [
        (((1, 0.5, 0.5),), "1@0.5-0.5"),
        (((1, 0.6, 0.4),), "1@0.6-0.4"),
        (((1, 0, 1.5),), "1@0-1.5"),
        (((1, 0, 0.6), (2, 0.5, 1)), "2@0.5-1 overlaps"),
    ],
)
def test_pieces_that_make_no_schedule_are_named(pieces, culprit):
    with refused(culprit):
        WeightSchedule(pieces)


# As text.


def test_weights_are_read_from_text():
    assert parse_weights("bright=0.7,small=0.3") == {"bright": 0.7, "small": 0.3}
    assert parse_weights(" bright = 1e-1 , small=2") == {"bright": 0.1, "small": 2}


def test_the_least_that_a_weight_is_over_the_run():
    weights = parse_weights("a=0.5@0-0.5,-0.2@0.5-1,b=0.7")
    assert (lowest(weights["a"]), lowest(weights["b"])) == (-0.2, 0.7)


def test_weights_over_the_steps_are_read_from_text_and_written_back():
    text = "bright=0.9@0-0.5,0.2@0.5-1,small=0.5"
    weights = parse_weights(text)
    assert weights == {"bright": HALVES, "small": 0.5}
    assert label_weights(weights) == text


@pytest.mark.parametrize(
    "text",
    [
        *["", ",", "bright", "bright=", "=1", "bright=much", "bright=1,", "bright=1,bright=2", "bright=1 small=2"],
        *["bright=0.9@0", "bright=0.9@0-", "bright=0.9@0-0.5,0.2", "0.9@0-1", "bright=@0-1"],
    ],
)
def test_weights_that_can_not_be_read_are_named(text):
    with refused(repr(text), "NAME=NUMBER"):
        parse_weights(text)
