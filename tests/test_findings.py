"""Sentences follow the figures, for product and against it."""

import pytest

from stepfuse.scripts.evaluation.findings import decimals, excludes_zero, findings, text
from tests.fixtures_evaluation import UNKNOWN, cell, figures, noisy

ENDS = {1.0: (2.0, 1.0), 0.0: (1.0, 2.0)}


def front(rule, middle, *, nfe=40.0):
    """Three cells of a rule: the two adapters alone, and this point half way."""
    points = {**ENDS, 0.5: (middle, middle)}
    return [noisy(rule, share, point).assign(nfe=nfe) for share, point in points.items()]


def told(*cells):
    return findings(figures(cell("base", None), *cells))


def about(sentences, *words):
    return [sentence for sentence in sentences if all(word in sentence for word in words)]


@pytest.mark.parametrize(("middle", "sign"), [(1.9, "+"), (1.7, "−")])
def test_a_front_is_said_to_be_above_or_below_products_as_the_figures_are(middle, sign):
    """The base at (0, 0) makes (−0.2, −0.2) the reference; 1.8 half way is what product has."""
    (sentence,) = about(told(*front("product", 1.8), *front("soup", middle)), "Hypervolume of soup")
    assert sentence.startswith(f"Hypervolume of soup minus that of product: {sign}0.")
    assert "(excludes 0), over the 3 weights and strengths that both have" in sentence


def test_equal_fronts_are_not_told_apart_and_the_cheaper_is_named():
    sentences = told(*front("product", 1.8, nfe=60), *front("soup", 1.8, nfe=30), *front("code", 1.9, nfe=300))
    assert about(sentences, "Hypervolume of soup", "(holds 0)")
    (cheapest,) = about(sentences, "cheapest rule within noise of product is soup", "0.50 × its network evaluations")
    assert "not shown to be equal" in cheapest


def test_a_cheaper_rule_of_less_volume_is_not_within_noise():
    assert about(told(*front("product", 1.8, nfe=60), *front("soup", 1.2)), "Every rule cheaper", "beyond noise: soup.")


def test_a_dearer_rule_is_not_the_cheapest_whatever_its_volume():
    assert about(told(*front("product", 1.8, nfe=60), *front("code", 1.9, nfe=300)), "No rule", "is cheaper")


def test_one_adapter_alone_is_no_cheaper_way_to_fuse():
    """Product with all weight on one objective is that adapter: a rule of nothing else is not compared by cost."""
    alone = [noisy("kl", share, point).assign(nfe=20) for share, point in ENDS.items()]
    sentences = told(*front("product", 1.8, nfe=60), *alone)
    assert about(sentences, "Hypervolume of kl", "No mixed weights")
    assert about(sentences, "No rule with mixed weights in common with product is cheaper")


def test_weights_at_which_product_is_not_best_are_named_with_rule_and_difference():
    """Half way, soup has 0.5 · 0.1 + 0.5 · 0.1 = 0.1 more than product."""
    sentences = told(*front("product", 1.8), *front("soup", 1.9), *front("switch", 1.6))
    assert about(sentences, "highest weighted reward at 2 of 3 weights", "above it at 1", "excludes 0 at 1")
    assert about(sentences, "Not product but") == [
        "Not product but soup is best at x=0.5,y=0.5: by +0.100 [+0.100, +0.100] (excludes 0)."
    ]


def test_where_product_is_best_everywhere_no_other_rule_is_named():
    sentences = told(*front("product", 1.8), *front("soup", 1.7))
    assert about(sentences, "highest weighted reward at 3 of 3 weights")
    assert not about(sentences, "Not product but")


def test_an_oracle_that_is_not_above_the_base_is_told():
    """0.5 · (−1) + 0.5 · 0.5 = −0.25; the other gains 1."""
    weak = [cell("product", 0.5, (1, 1)), cell("oracle", 0.5, (-1, 0.5))]
    (sentence,) = about(told(*weak), "The oracle at")
    assert "x=0.5,y=0.5" in sentence
    assert "−0.250" in sentence
    assert not about(told(weak[0], cell("oracle", 0.5, (1, 1))), "The oracle at")


def test_rules_that_see_the_rewards_are_told_apart_from_those_that_fuse():
    """0.5 · 2 + 0.5 · 2 more than product in 300 / 40 of the seconds, and nothing against soup's 0."""
    sentences = told(
        cell("product", 0.5, (1, 1)),
        cell("product", 1.0, (1, 0)),
        cell("soup", 0.5, (1, 1)),
        cell("code", 0.5, (3, 3), seconds=7.5),
    )
    (sentence,) = about(sentences, "code, which sees the rewards while sampling, at x=0.5,y=0.5")
    assert "minus product's +2.00" in sentence
    assert "7.5 × the seconds" in sentence
    assert "rz +0.00" in sentence or "rz 0" in sentence or "rz +0" in sentence
    (fused,) = about(sentences, "Among rules that fuse")
    assert "at 1 of 1 weights; another rule is above it at 0" in fused


def test_the_lowest_regret_is_that_of_rules_with_all_of_the_oracles_weights():
    """Of the oracle's 2 half way and (1.5, 1.5) at a quarter soup lacks 0.1 and 0, product 0.2 and 0."""
    oracle = [noisy("oracle", 0.5, (2.0, 2.0)), noisy("oracle", 0.25, (1.5, 1.5))]
    quarters = [noisy(rule, 0.25, (1.5, 1.5)) for rule in ("product", "soup")]
    cells = [*front("product", 1.8), *front("soup", 1.9), *front("switch", 1.95), *quarters, *oracle]
    (sentence,) = about(told(*cells), "Lowest mean regret")
    assert sentence.startswith("Lowest mean regret over the 2 mixed weights with an oracle: soup, 0.0500 [")
    assert "next product, 0.100 [" in sentence
    assert "soup minus product: −0.0500" in sentence
    assert "Left out for having fewer of these weights: switch (1)." in sentence


def test_without_oracle_or_product_it_says_so():
    sentences = told(*front("soup", 1.8))
    assert about(sentences, "no cells of rule product")
    assert about(sentences, "No oracle was trained")


def test_held_out_rewards_are_counted_against_product_too():
    """One of three cells loses of the held-out reward, one gains, and one has as much as the base."""
    change = {1.0: -1.0, 0.5: 1.0, 0.0: 0.0}
    rows = [cell("product", share, (1, 1), reward_rz=gain, diversity=0.3) for share, gain in change.items()]
    base = cell("base", None, diversity=0.4)
    sentences = findings(figures(base, *rows))
    assert about(sentences, "rz, which nothing was trained on", "lower in 1, higher in 1, within noise in 1")
    assert about(sentences, "Diversity of product's cells", "0.75 to 0.75 ×")


def test_images_without_a_score_are_told():
    lost = cell("product", 1.0, own=lambda i, k: {"reward_rz": UNKNOWN} if i == 0 else {})
    assert about(told(lost), "2 images, in 1 cells, have no finite rz")


def test_numbers_have_the_digits_that_their_intervals_warrant():
    """Two digits of the half width: 0.05 gives three places, 30 gives none; three digits where there is no width."""
    assert text({"mean": 1.23456, "low": 1.18456, "high": 1.28456}) == "1.235 [1.185, 1.285]"
    assert text({"mean": -123.4, "low": -153.4, "high": -93.4}, signed=True) == "−123 [−153, −93]"
    assert text({"mean": 0.5, "low": 0.5, "high": 0.5}, signed=True) == "+0.500 [+0.500, +0.500]"
    assert text({"mean": 3.5, "low": None, "high": None}) == "3.50"
    assert text(None) == "unknown"
    assert (decimals(0.0), decimals(12345.6), decimals(0.0123)) == (0, 0, 4)


def test_a_bound_that_is_not_zero_is_not_written_as_zero():
    assert text({"mean": 0.0175, "low": 0.0004, "high": 0.035}, signed=True) == "+0.0175 [+0.0004, +0.0350]"


def test_what_sums_in_another_order_differ_by_is_no_difference():
    assert not excludes_zero({"mean": 4e-16, "low": 2e-16, "high": 6e-16})
    assert excludes_zero({"mean": -4e-6, "low": -6e-6, "high": -2e-6})
    assert text({"mean": 0.1, "low": 0.1, "high": 0.1 + 3e-17}) == "0.100 [0.100, 0.100]"
