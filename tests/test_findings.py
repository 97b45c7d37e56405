"""Findings follow from the figures, for product and against it, and are put into words."""

import html
import re
from pathlib import Path

import pytest

from stepfuse.data.intervals import decimals, excludes_zero
from stepfuse.data.intervals import interval_text as text
from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.evaluation import report
from stepfuse.scripts.evaluation.findings import findings
from tests.fixtures_evaluation import UNKNOWN, cell, figures, noisy

ENDS = {1.0: (2.0, 1.0), 0.0: (1.0, 2.0)}


def front(rule, middle, *, nfe=40.0):
    """Three cells of a rule: the two adapters alone, and this point half way."""
    points = {**ENDS, 0.5: (middle, middle)}
    return [noisy(rule, share, point).assign(nfe=nfe) for share, point in points.items()]


def facts(*cells, kind=None, rules=RULES):
    """The findings of these cells and a base at (0, 0), of one kind."""
    found = findings(figures(cell("base", None), *cells), rules)
    return [finding for finding in found if finding.kind == kind] if kind else found


def comparison_of(finding):
    """Where the interval of a finding lies."""
    if not excludes_zero(finding.value):
        return "within noise"
    return "above" if finding.value["mean"] > 0 else "below"


@pytest.mark.parametrize(("middle", "comparison"), [(1.9, "above"), (1.7, "below")])
def test_a_front_is_above_or_below_products_as_the_figures_are(middle, comparison):
    """The base at (0, 0) makes (−0.2, −0.2) the reference; 1.8 half way is what product has."""
    (finding,) = facts(*front("product", 1.8), *front("soup", middle), kind="hypervolume")
    assert (finding.rule, comparison_of(finding)) == ("soup", comparison)
    assert finding.details == {"matched": 3, "all_cells": None, "cells": 3, "product_cells": 3}


def test_equal_fronts_are_within_noise_and_the_cheaper_rule_is_found():
    cells = [*front("product", 1.8, nfe=60), *front("soup", 1.8, nfe=30), *front("code", 1.9, nfe=300)]
    soup, _ = facts(*cells, kind="hypervolume")
    assert (soup.rule, comparison_of(soup)) == ("soup", "within noise")
    (cheapest,) = facts(*cells, kind="cheapest")
    assert (cheapest.rule, cheapest.details["nfe"], comparison_of(cheapest)) == ("soup", 0.5, "within noise")


def test_a_cheaper_rule_of_less_volume_is_not_within_noise():
    cells = [*front("product", 1.8, nfe=60), *front("soup", 1.2)]
    (finding,) = facts(*cells, kind="cheaper_is_worse")
    assert finding.details == {"rules": ["soup"]}
    assert not facts(*cells, kind="cheapest")


def test_a_dearer_rule_is_not_the_cheapest_whatever_its_volume():
    assert facts(*front("product", 1.8, nfe=60), *front("code", 1.9, nfe=300), kind="none_cheaper")


def test_one_adapter_alone_is_not_a_cheaper_fusion():
    """Product with all weight on one objective is that adapter: a rule of nothing else is not compared by cost."""
    single = [noisy("kl", share, point).assign(nfe=20) for share, point in ENDS.items()]
    cells = [*front("product", 1.8, nfe=60), *single]
    (volume,) = facts(*cells, kind="hypervolume")
    assert (volume.rule, volume.details["matched"], volume.details["cells"]) == ("kl", None, 2)
    assert facts(*cells, kind="none_cheaper")


def test_weights_at_which_product_is_not_best_have_the_better_rule_and_its_difference():
    """Half way, soup has 0.5 · 0.1 + 0.5 · 0.1 = 0.1 more than product."""
    cells = [*front("product", 1.8), *front("soup", 1.9), *front("switch", 1.6)]
    (won,) = facts(*cells, kind="weights_won")
    assert won.details == {"weights": 3, "won": 2, "lost": 1, "resolved": 1}
    (better,) = facts(*cells, kind="better_rule")
    assert (better.rule, comparison_of(better), better.details) == ("soup", "above", {"weights": "x=0.5,y=0.5"})
    assert better.value["mean"] == pytest.approx(0.1)


def test_two_rules_that_are_the_same_adapter_are_not_told_apart_by_rounding():
    """With all the weight on one reward, soup and product differ in the last bits of an image."""
    nearly = [noisy("soup", share, tuple(value + 2e-6 for value in point)) for share, point in ENDS.items()]
    cells = [*front("product", 1.8), *nearly, noisy("soup", 0.5, (1.8 + 2e-6, 1.8 + 2e-6))]
    (won,) = facts(*cells, kind="weights_won")
    assert won.details == {"weights": 3, "won": 3, "lost": 0, "resolved": 0}
    assert not facts(*cells, kind="better_rule")


def test_where_product_is_best_everywhere_no_other_rule_is_named():
    cells = [*front("product", 1.8), *front("soup", 1.7)]
    (won,) = facts(*cells, kind="weights_won")
    assert won.details == {"weights": 3, "won": 3, "lost": 0, "resolved": 0}
    assert not facts(*cells, kind="better_rule")


def test_an_oracle_that_is_not_above_the_base_is_found():
    """0.5 · (−1) + 0.5 · 0.5 = −0.25; the other gains 1."""
    product = cell("product", 0.5, (1, 1))
    (weak,) = facts(product, cell("oracle", 0.5, (-1, 0.5)), kind="weak_oracle")
    assert weak.details == {"weights": "x=0.5,y=0.5"}
    assert weak.value["mean"] == pytest.approx(-0.25)
    assert not facts(product, cell("oracle", 0.5, (1, 1)), kind="weak_oracle")


def test_rules_that_see_the_rewards_are_kept_apart_from_those_that_fuse():
    """0.5 · 2 + 0.5 · 2 more than product in 7.5 of the seconds, and nothing against soup's 0."""
    cells = [
        cell("product", 0.5, (1, 1)),
        cell("product", 1.0, (1, 0)),
        cell("soup", 0.5, (1, 1)),
        cell("code", 0.5, (3, 3), seconds=7.5),
    ]
    (code,) = facts(*cells, kind="rewarded")
    assert (code.rule, comparison_of(code), code.value["mean"]) == ("code", "above", pytest.approx(2))
    assert (code.details["weights"], code.details["seconds"]) == ("x=0.5,y=0.5", 7.5)
    assert code.details["held_out"] == {"rz": {"mean": 0, "low": 0, "high": 0}}
    (won,) = facts(*cells, kind="weights_won")
    assert (won.details["won"], won.details["weights"]) == (1, 1)


def test_a_rule_under_another_label_is_what_the_rule_says_it_is():
    """Best of 4 and an oracle have labels of their own; neither is a rule that fuses, nor the cheapest."""
    cells = [*front("product", 1.8, nfe=60), *front("best of 4", 1.9, nfe=30), *front("trained", 1.9, nfe=30)]
    rules = {"product": RULES["product"], "best of 4": RULES["code"], "trained": RULES["oracle"]}
    assert {finding.rule for finding in facts(*cells, kind="rewarded", rules=rules)} == {"best of 4"}
    (won,) = facts(*cells, *front("mine", 1.7), kind="weights_won", rules=rules)
    assert (won.details["won"], won.details["weights"]) == (3, 3)
    assert facts(*cells, kind="none_cheaper", rules=rules)


def test_the_lowest_regret_is_that_of_rules_with_all_of_the_oracles_weights():
    """Of the oracle's 2 half way and (1.5, 1.5) at a quarter soup lacks 0.1 and 0, product 0.2 and 0."""
    oracle = [noisy("oracle", 0.5, (2.0, 2.0)), noisy("oracle", 0.25, (1.5, 1.5))]
    quarters = [noisy(rule, 0.25, (1.5, 1.5)) for rule in ("product", "soup")]
    cells = [*front("product", 1.8), *front("soup", 1.9), *front("switch", 1.95), *quarters, *oracle]
    (lowest,) = facts(*cells, kind="lowest_regret")
    assert (lowest.rule, lowest.value["mean"], lowest.details["weights"]) == ("soup", pytest.approx(0.05), 2)
    ((second, regret),) = lowest.details["next"]
    assert (second, regret["mean"]) == ("product", pytest.approx(0.1))
    assert lowest.details["over_product"]["mean"] == pytest.approx(-0.05)
    assert lowest.details["fewer_weights"] == {"switch": 1}


def test_without_oracle_or_product_that_is_a_finding():
    assert {"no_product", "no_oracle"} <= {finding.kind for finding in facts(*front("soup", 1.8))}


def test_held_out_rewards_are_counted_against_product_too():
    """One of three cells loses of the held-out reward, one gains, and one has as much as the base."""
    change = {1.0: -1.0, 0.5: 1.0, 0.0: 0.0}
    rows = [cell("product", share, (1, 1), reward_rz=gain, diversity=0.3) for share, gain in change.items()]
    found = {finding.kind: finding for finding in findings(figures(cell("base", None, diversity=0.4), *rows))}
    assert found["held_out"].reward == "rz"
    assert found["held_out"].details == {"cells": 3, "lower": 1, "higher": 1, "within_noise": 1, "judge": False}
    assert found["diversity"].details == pytest.approx({"low": 0.75, "high": 0.75})


def test_images_without_a_score_are_counted():
    lost = cell("product", 1.0, own=lambda i, k: {"reward_rz": UNKNOWN} if i == 0 else {})
    (missing,) = facts(lost, kind="missing")
    assert (missing.reward, missing.details) == ("rz", {"images": 2, "cells": 1})


def test_every_kind_of_finding_has_its_sentence_with_its_numbers():
    """In text and in HTML; the macros of the template are the kinds that these evaluations have."""
    costly = [*front("product", 1.8, nfe=60), *front("soup", 1.8, nfe=30), *front("code", 1.9, nfe=300)]
    lost = cell("product", 0.25, own=lambda i, k: {"reward_rz": UNKNOWN} if i == 0 else {}, diversity=0.3)
    weak = [cell("oracle", 0.5, (-1, 0.5)), lost, *front("switch", 1.9)]
    several = [figures(cell("base", None, diversity=0.4), *costly, *weak)]
    several += [figures(cell("base", None), *front("soup", 1.8))]
    several += [figures(cell("base", None), *front("product", 1.8, nfe=60), *front("soup", 1.2))]
    several += [figures(cell("base", None), *front("product", 1.8, nfe=60))]
    strengths = [noisy("soup", 0.5, (s, s)).assign(strength=s, kl=s) for s in (1.0, 2.0)]
    several += [figures(cell("base", None), *strengths, noisy("oracle", 0.5, (3, 3)).assign(kl=1.5))]
    template = Path(report.__file__).with_name("findings.j2").read_text()
    kinds = set(re.findall(r"macro (\w+)\(finding\)", template))
    assert {finding.kind for summary in several for finding in findings(summary)} == kinds
    for summary in several:
        for finding, sentence, marked in zip(
            findings(summary), report.sentences(summary), report.sentences(summary, html=True), strict=True
        ):
            assert sentence == " ".join(sentence.split())
            assert html.unescape(str(marked)) == sentence
            assert finding.value is None or any(text(finding.value, signed=sign) in sentence for sign in (True, False))


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
