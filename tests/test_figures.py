"""Figures of small tables whose values are worked by hand; rewards are divided by their units, 2 and 0.5."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stepfuse.rewards.statistics import paired_interval
from stepfuse.scripts.evaluation.figures import summarise
from tests.fixtures_evaluation import PROMPTS, SETUP, UNKNOWN, cell, figures, noisy, of
from tests.fixtures_tiny import refused


def sure(value: float) -> dict:
    """An interval without width."""
    return pytest.approx({"mean": value, "low": value, "high": value}, abs=1e-12)


def test_the_volume_of_two_points_is_that_of_two_overlapping_rectangles():
    """Points (2, 1) and (1, 2) and the base at (0, 0): ranges of 2, so the reference point is (−0.2, −0.2).

    2.2·1.2 + 1.2·2.2 − 1.2·1.2 = 3.84 for product, 0.2² = 0.04 for the base.
    """
    summary = figures(cell("base", None), cell("product", 1.0, (2, 1)), cell("product", 0.0, (1, 2)))
    assert summary["reference"] == pytest.approx({"x": -0.2, "y": -0.2})
    assert summary["rules"]["product"]["hypervolume"] == sure(3.84)
    assert summary["rules"]["base"]["hypervolume"] == sure(0.04)
    assert summary["rules"]["base"]["over_product"] == sure(-3.80)


def test_the_distance_to_the_oracle_counts_its_best_cells_alone():
    """From (3, 0) to (3, 1) it is 1, from (0, 4) to (0, 0) it is 4; (−1, −1) is dominated: (1 + 4) / 2."""
    oracle = [cell("oracle", share, point) for share, point in ((0.9, (3, 0)), (0.1, (0, 4)), (0.5, (-1, -1)))]
    summary = figures(cell("base", None), *oracle, cell("product", 1.0, (0, 0)), cell("product", 0.0, (3, 1)))
    assert summary["rules"]["product"]["igd"] == sure(2.5)
    assert summary["rules"]["oracle"]["igd"] is None


def test_without_an_oracle_there_is_no_distance_to_it():
    summary = figures(cell("base", None), cell("product", 1.0, (1, 1)))
    assert summary["rules"]["product"]["igd"] is None
    assert summary["rules"]["product"]["regret"] is None


def test_wins_are_the_share_of_pairs_that_score_higher_with_ties_half():
    """Prompt a wins and ties, b loses and wins: 0.75 and 0.5, of which resampling makes 0.5, 0.625 and 0.75."""
    gains = [[1.0, 0.0], [-1.0, 5.0]]
    rows = cell("product", 1.0, own=lambda i, k: {"reward_rz": gains[i][k]}, prompts=("a", "b"))
    summary = figures(cell("base", None, prompts=("a", "b")), rows)
    wins = of(summary, "product")["rewards"]["rz"]["wins"]
    assert wins == pytest.approx({"mean": 0.625, "low": 0.5, "high": 0.75})


def test_a_gain_is_paired_so_what_prompts_share_cancels():
    """Prompts score 0, 100 and 200, and every image 0.5 more than the base's: sure, though the mean is not."""
    rows = cell("product", 1.0, own=lambda i, k: {"reward_rx": 100.0 * i + 0.5})
    summary = figures(cell("base", None, own=lambda i, k: {"reward_rx": 100.0 * i}), rows)
    reward = of(summary, "product")["rewards"]["rx"]
    assert reward["gain"] == sure(0.5)
    assert reward["mean"]["mean"] == pytest.approx(100.5)
    assert (reward["mean"]["low"], reward["mean"]["high"]) == pytest.approx((0.5, 200.5))
    assert of(summary, "product")["scalarised_gain"] == sure(0.5 / 2)


def test_gains_are_those_of_the_paired_interval():
    scores, baseline = np.random.default_rng(0).normal(size=(2, 3, 2))
    base = cell("base", None, own=lambda i, k: {"reward_rz": baseline[i, k]})
    rows = cell("product", 1.0, own=lambda i, k: {"reward_rz": scores[i, k]})
    gain = of(figures(base, rows), "product")["rewards"]["rz"]["gain"]
    assert gain == vars(paired_interval(scores.ravel(), baseline.ravel(), np.repeat(PROMPTS, 2)))


def test_the_base_neither_gains_nor_wins_against_itself():
    reward = of(figures(cell("base", None), cell("product", 1.0)), "base")["rewards"]["rx"]
    assert (reward["gain"], reward["wins"]) == (None, None)


def test_regret_is_what_the_oracle_at_the_same_weights_has_more():
    """0.25 · (3 − 2.5) + 0.75 · (1.4 − 1) = 0.125 + 0.3; against the base 0.25 · 2.5 + 0.75 · 1 = 1.375."""
    summary = figures(
        cell("base", None),
        cell("product", 0.25, (2.5, 1)),
        cell("switch", 0.25, (2.1, 1.2)),
        cell("oracle", 0.25, (3, 1.4)),
        cell("switch", 0.5, (1, 1)),
        cell("product", 0.5, (2, 2)),
    )
    product, switch = of(summary, "product", 0.25), of(summary, "switch", 0.25)
    assert (product["regret"], product["oracle"]) == (sure(0.425), "oracle")
    assert product["scalarised_gain"] == sure(1.375)
    assert of(summary, "oracle", 0.25)["regret"] == sure(0)
    assert switch["over_product"] == sure(0.25 * -0.4 + 0.75 * 0.2)
    assert of(summary, "switch", 0.5)["regret"] is None
    assert of(summary, "switch", 0.5)["over_product"] == sure(-1)
    assert of(summary, "oracle", 0.25)["over_product"] == sure(0.425)
    assert summary["rules"]["switch"]["regret"] == {"weights": 1, "mean": sure(0.375), "over_product": sure(-0.05)}


def test_one_adapter_is_its_own_oracle_unless_another_was_trained():
    """At x alone product has (3, 0) and switch (2, 0): 1 of regret, and 2 once an oracle has (4, 0)."""
    cells = [cell("base", None), cell("product", 1.0, (3, 0)), cell("switch", 1.0, (2, 0))]
    alone, trained = figures(*cells), figures(*cells, cell("oracle", 1.0, (4, 0)))
    assert (of(alone, "switch")["regret"], of(alone, "switch")["oracle"]) == (sure(1), "product")
    assert (of(trained, "switch")["regret"], of(trained, "switch")["oracle"]) == (sure(2), "oracle")
    # A rule's mean regret is over mixtures: all the weight on one adapter is no question of fusion.
    assert alone["rules"]["switch"]["regret"] is trained["rules"]["switch"]["regret"] is None


def test_monotonicity_is_the_rank_correlation_of_weight_and_reward():
    """Both rewards rise with the weight of x; three weights make a rank, two do not, nor one value at all."""
    rows = [cell("product", share, (share**3, share)) for share in (0.0, 0.5, 1.0)]
    rows += [cell("kl", share, (share, share), strength=s) for share in (0.0, 1.0) for s in (1.0, 2.0)]
    rows += [cell("soup", share, (1, share)) for share in (0.0, 0.5, 1.0)]
    rules = figures(cell("base", None), *rows)["rules"]
    assert rules["product"]["monotonicity"] == pytest.approx({"x": 1, "y": -1})
    assert rules["kl"]["monotonicity"] == {"x": None, "y": None}
    assert rules["soup"]["monotonicity"] == {"x": None, "y": pytest.approx(-1)}


def test_costs_are_multiples_of_one_adapters():
    """One adapter takes 40 and 44 evaluations, 42 on average; 63 are 1.5 times as many."""
    rows = [cell("product", 1.0, nfe=40, seconds=2, peak_memory_mb=100), cell("product", 0.0, nfe=44, seconds=4)]
    blend = cell("product", 0.5, nfe=63, own=lambda i, k: {"seconds": [1.0, 2, 3, 6, 9, 90][2 * i + k]})
    summary = figures(cell("base", None), *rows, blend, cell("product", 1.0, strength=2.0, nfe=400))
    half = of(summary, "product", 0.5)
    assert half["of_one_adapter"] == pytest.approx({"nfe": 1.5, "seconds": 4.5 / 3, "peak_memory_mb": None})
    assert half["seconds"] == 4.5  # between 3 and 6
    assert half["seconds_p95"] == pytest.approx(9 + 0.75 * 81)  # place 0.95 · 5 = 4.75 of 0 to 5
    assert summary["one_adapter"] == {"nfe": 42, "seconds": 3, "peak_memory_mb": 100}
    assert figures(cell("base", None), cell("product", 0.5))["one_adapter"] is None


def test_peak_memory_is_the_largest_measured():
    rows = cell("product", 1.0, own=lambda i, k: {"peak_memory_mb": [UNKNOWN, 7.0, 5.0][i]})
    assert of(figures(cell("base", None), rows), "product")["peak_memory_mb"] == 7


def test_diversity_is_told_as_a_multiple_of_the_bases():
    summary = figures(cell("base", None, diversity=0.4), cell("product", 1.0, diversity=0.3, kl=2.0))
    product = of(summary, "product")
    assert (product["diversity"], product["diversity_ratio"], product["kl"]) == (sure(0.3), sure(0.75), sure(2))


def test_what_was_not_measured_is_none():
    product = of(figures(cell("base", None), cell("product", 1.0)), "product")
    assert [product[key] for key in ("kl", "diversity", "diversity_ratio", "peak_memory_mb")] == [None] * 4


def test_what_was_measured_for_one_prompt_has_no_interval():
    rows = cell("product", 1.0, own=lambda i, k: {"kl": 3.0 + k} if i == 0 else {})
    product = of(figures(cell("base", None), rows), "product")
    assert product["kl"] == {"mean": 3.5, "low": None, "high": None}


def test_an_image_without_a_score_is_counted_and_left_out():
    """Of gains of 1, 1, 1, 1, 4 and none the mean is 8/5."""
    rows = cell("product", 1.0, own=lambda i, k: {"reward_rx": [1.0, 1, 1, 1, 4, UNKNOWN][2 * i + k]})
    reward = of(figures(cell("base", None), rows), "product")["rewards"]["rx"]
    assert (reward["missing"], reward["mean"]["mean"], reward["gain"]["mean"]) == (1, 1.6, 1.6)


def test_a_cell_without_a_reward_has_no_part_in_the_front():
    """What is left is the base at (0, 0), and (2, 1) with its 2.2 · 1.1 above (−0.2, −0.1)."""
    lost = cell("product", 0.5, (9, 9), own=lambda i, k: {"reward_ry": UNKNOWN})
    summary = figures(cell("base", None), cell("product", 1.0, (2, 1)), lost)
    assert summary["rules"]["product"]["hypervolume"] == sure(2.42)
    assert of(summary, "product", 0.5)["rewards"]["ry"] == {"missing": 6, "mean": None, "gain": None, "wins": None}
    assert of(summary, "product", 0.5)["scalarised_gain"] is None


def test_weights_that_change_over_steps_are_not_scalarised():
    rows = cell("product", None, (2, 2)).assign(weights="x 1→0")
    summary = figures(cell("base", None), rows)
    product = of(summary, "product")
    assert [product[key] for key in ("shares", "scalarised_gain", "regret", "oracle")] == [None] * 4
    assert summary["rules"]["product"]["hypervolume"] is not None
    assert summary["grid"] == []


def test_the_same_prompts_are_drawn_for_all_rules_so_equal_rules_differ_by_nothing():
    points = ((1.0, (2, 1)), (0.5, (1.8, 1.8)), (0.0, (1, 2)))
    cells = [noisy(rule, share, point) for rule in ("product", "switch") for share, point in points]
    rules = figures(cell("base", None), *cells)["rules"]
    volume = rules["product"]["hypervolume"]
    assert volume["high"] - volume["low"] > 0.5 * volume["mean"]
    assert rules["switch"]["over_product"] == sure(0)


def test_a_front_that_several_figures_need_is_measured_once(monkeypatch):
    """Those of base, product and switch, each at the estimate and 20 draws; switch has the weights of product."""
    measured = []
    monkeypatch.setattr("moocore.Hypervolume", lambda **_: lambda points: measured.append(points) or 1.0)
    cells = [noisy(rule, share, (1, 2)) for rule in ("product", "switch") for share in (1.0, 0.5)]
    rules = figures(cell("base", None), *cells, draws=20)["rules"]
    assert rules["switch"]["matched"]["over_product"] == rules["switch"]["over_product"] == sure(0)
    assert len(measured) == 3 * 21


def test_a_rule_of_fewer_weights_is_compared_at_those_that_product_has_too():
    """Of the same points switch lacks one, and with it volume; where both were measured they are equal."""
    points = ((1.0, (2, 1)), (0.5, (1.8, 1.8)), (0.0, (1, 2)))
    cells = [noisy("product", share, point) for share, point in points]
    cells += [noisy("switch", share, point) for share, point in points[:2]]
    rules = figures(cell("base", None), *cells, cell("switch", 0.25, (9, -9), strength=3.0))["rules"]
    switch = rules["switch"]
    assert switch["over_product"]["mean"] != 0
    assert switch["matched"]["over_product"] == sure(0)
    assert (switch["matched"]["cells"], switch["matched"]["mixed"], switch["cells"]) == (2, 1, 3)
    assert switch["lacks"] == ["x=0,y=1"]
    assert rules["product"]["lacks"] == ["x=0.25,y=0.75"]
    assert rules["product"]["matched"] is None


def test_the_order_of_rows_is_of_no_account():
    scores = np.random.default_rng(0).normal(size=(3, 2))
    rows = [cell("base", None), cell("product", 1.0, own=lambda i, k: {"reward_rx": scores[i, k]}, nfe=60)]
    ordered, shuffled = pd.concat(rows), pd.concat([rows[0], rows[1].sample(frac=1, random_state=0)])
    assert summarise(ordered, SETUP, draws=50) == summarise(shuffled, SETUP, draws=50)


def test_without_exactly_one_base_there_is_nothing_to_compare_with():
    with refused("0 cells of rule 'base'"):
        figures(cell("product", 1.0))
    with refused("2 cells of rule 'base'"):
        figures(cell("base", None), cell("base", None, strength=0.0))


def test_a_cell_of_other_images_is_named():
    base, name = cell("base", None), ("'product'", "'x=1,y=0'", "strength 1")
    with refused(*name, "lacks prompt 'c' with seed 0"):
        figures(base, cell("product", 1.0, prompts=("a", "b")))
    with refused(*name, "has prompt 'd' with seed 0"):
        figures(base, cell("product", 1.0, prompts=(*PROMPTS, "d")))
    with refused(*name, "lacks prompt 'a' with seed 1"):
        figures(base, cell("product", 1.0, seeds=(0, 2)))
    with refused(*name, "'a' with seed 0 more than once"):
        figures(base, cell("product", 1.0), cell("product", 1.0))


def test_a_missing_column_and_a_single_prompt_are_refused():
    with refused("'reward_rz'"):
        summarise(cell("base", None).drop(columns="reward_rz"), SETUP)
    with refused("at least two prompts"):
        figures(cell("base", None, prompts=("a",)))


def test_regret_is_of_the_reward_that_the_oracle_was_trained_on():
    """Trained on 0.5 rx/1 + 0.5 ry/0.5 where σ is (2, 0.5): in units of σ its weights are 1 and 0.5, or 2/3 and 1/3.

    Against product at (1, 1) its (2, 0.5) has 2/3 · 1 − 1/3 · 0.5 = 0.5 more; at σ itself 0.5 · 1 − 0.5 · 0.5 = 0.25.
    """
    cells = [cell("base", None), cell("product", 0.5, (1, 1)), cell("oracle", 0.5, (2, 0.5))]
    halves = {"x": 0.5, "y": 0.5}
    for units, regret in (({"x": 1.0, "y": 0.5}, 0.5), ({"x": 2.0, "y": 0.5}, 0.25), ({"x": 20.0, "y": 5.0}, 0.25)):
        setup = replace(SETUP, oracles=(({"x": 1.0}, {"x": 9.0}), (halves, units)))
        summary = summarise(pd.concat(cells), setup, draws=20)
        assert of(summary, "product", 0.5)["regret"] == sure(regret)
        assert summary["rules"]["product"]["regret"]["mean"] == sure(regret)
        assert of(summary, "oracle", 0.5)["scalarised_gain"] == sure(1.25)
