"""Shares of the oracle's gain, worked by hand; rewards of (1, 1) are a weighted gain of 1 at all weights."""

import pandas as pd
import pytest

from stepfuse.scripts.evaluation import shares
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.findings import findings
from stepfuse.scripts.evaluation.plots import edge
from stepfuse.scripts.evaluation.report import write_report
from stepfuse.scripts.evaluation.tables import cells_table, rules_table
from tests.fixtures_evaluation import SETUP, cell, figures, of

SHARES = ("share_of_oracle", "share_at_oracle_kl")


def sure(value):
    """An interval without width."""
    return pytest.approx({"mean": value, "low": value, "high": value}, abs=1e-12)


def growing(rule, share, gains, **columns):
    """A cell whose prompts gain these in both rewards, and have these KL."""

    def own(i, _):
        return {"reward_rx": 2 * gains[i], "reward_ry": 0.5 * gains[i]} | {k: v[i] for k, v in columns.items()}

    return cell(rule, share, own=own)


def test_a_share_is_the_gain_divided_by_that_of_the_oracle_at_the_same_weights():
    """Of 1 and 2 half way 0.5; at a quarter 0.25 · 4 + 0.75 · 0 of 0.25 · 1 + 0.75 · 1."""
    rows = [cell("oracle", 0.5, (2, 2)), cell("product", 0.5, (1, 1)), cell("soup", 0.5, (1, 1), strength=2.0)]
    rows += [cell("oracle", 0.25, (1, 1)), cell("product", 0.25, (4, 0))]
    summary = figures(cell("base", None), *rows)
    assert of(summary, "product", 0.5)["share_of_oracle"] == sure(0.5)
    assert of(summary, "soup", 0.5, strength=2.0)["share_of_oracle"] == sure(0.5)
    assert of(summary, "product", 0.25)["share_of_oracle"] == sure(1)
    assert of(summary, "oracle", 0.5)["share_of_oracle"] == sure(1)
    assert summary["rules"]["product"]["share_of_oracle"] == {"weights": 2, "mean": sure(0.75)}
    assert summary["rules"]["soup"]["share_of_oracle"] is None  # not at strength 1


def test_a_share_is_a_ratio_of_means_by_the_same_draws():
    """Gains of 1, 3 and 5 of 2, 6 and 10 are 0.5 in every draw; of 2, 2 and 14 they are 0.5, 1.5 and 5/14 alone."""
    base, half = cell("base", None), growing("product", 0.5, (1, 3, 5))
    summary = figures(base, half, growing("oracle", 0.5, (2, 6, 10)))
    whole = of(summary, "oracle", 0.5)["scalarised_gain"]
    assert (whole["low"], whole["high"]) == pytest.approx((2, 10))
    assert of(summary, "product", 0.5)["share_of_oracle"] == sure(0.5)
    share = of(figures(base, half, growing("oracle", 0.5, (2, 2, 14)), draws=2000), "product", 0.5)["share_of_oracle"]
    assert share == pytest.approx({"mean": 9 / 18, "low": 5 / 14, "high": 3 / 2})  # a draw of one prompt is 1 of 27


def test_where_the_oracle_is_not_clearly_above_the_base_there_is_no_share_and_the_reason_is_told():
    """Gains of −3, 4 and 5 have an interval from −3."""
    rows = [cell("product", 0.5, (1, 1)), growing("oracle", 0.5, (-3, 4, 5)), cell("product", 0.25, (1, 1))]
    summary = figures(cell("base", None), *rows)
    half, quarter = of(summary, "product", 0.5), of(summary, "product", 0.25)
    assert [half[name] for name in SHARES] == [quarter[name] for name in SHARES] == [None, None]
    assert half["unknown"] == dict.fromkeys(SHARES, shares.WEAK_ORACLE)
    assert quarter["unknown"] == dict.fromkeys(SHARES, shares.NO_ORACLE)
    assert of(summary, "base")["unknown"] == dict.fromkeys(SHARES, shares.NO_WEIGHTS)
    assert [summary["rules"]["product"][name] for name in SHARES] == [None, None]
    assert summary["without_oracle"] == ["x=0.25,y=0.75"]


def test_at_one_objective_a_share_is_of_its_adapter_alone():
    """The rule of another set has 1.9 of the 2 that the adapter trained alone has; means are of mixtures only."""
    rows = [cell("product", 1.0, (2, 0)), cell("joint", 1.0, (1.9, 0.5)), cell("product", 0.5, (1, 1))]
    summary = figures(cell("base", None), *rows, cell("joint", 0.5, (3, 3)), cell("oracle", 0.5, (2, 2)))
    assert of(summary, "joint", 1.0)["share_of_oracle"] == sure(0.95)
    assert of(summary, "product", 1.0)["share_of_oracle"] == sure(1)
    assert summary["rules"]["joint"]["share_of_oracle"] == {"weights": 1, "mean": sure(1.5)}
    assert summary["without_oracle"] == []


def test_weights_between_those_of_the_oracles_are_points_of_the_front_without_a_share():
    """Of (2, 0), (1.8, 1.5) and (1, 1.6) the volume is the second's rectangle and what the others reach beyond it."""
    points = {1.0: (2, 0), 0.75: (1.8, 1.5), 0.25: (1, 1.6)}
    rows = [cell("product", share, point) for share, point in points.items()]
    summary = figures(cell("base", None), *rows, cell("oracle", 0.5, (1, 1)))
    assert [c["shares"]["x"] for c in edge(summary["cells"], "x", "y")] == [1.0, 0.75, 0.5, 0.25]
    assert summary["without_oracle"] == ["x=0.75,y=0.25", "x=0.25,y=0.75"]
    x, y = summary["reference"].values()
    volume = (1.8 - x) * (1.5 - y) + (2 - 1.8) * (0 - y) + (1 - x) * (1.6 - 1.5)
    assert summary["rules"]["product"]["hypervolume"] == sure(volume)


# At equal KL


def test_the_share_at_the_oracles_kl_is_interpolated_between_two_strengths():
    """Gains of 0.5, 1 and 1.2 at 100, 300 and 900 nats: at 200 nats 0.75, of the oracle's 1.5."""
    kls = {0.5: (0.5, 100.0), 1.0: (1.0, 300.0), 2.0: (1.2, 900.0)}
    rows = [cell("product", 0.5, (gain, gain), strength=s, kl=kl) for s, (gain, kl) in kls.items()]
    summary = figures(cell("base", None), *rows, cell("oracle", 0.5, (1.5, 1.5), kl=200.0))
    for strength, (_, kl) in kls.items():
        product = of(summary, "product", 0.5, strength)
        assert product["share_at_oracle_kl"] == sure(0.5)
        assert product["kl_of_oracle"] == sure(kl / 200)
    assert summary["rules"]["product"]["share_at_oracle_kl"] == {"weights": 1, "mean": sure(0.5)}


def test_the_share_at_the_oracles_kl_is_paired_in_gain_and_kl():
    """In every draw λ = 1 and 2 have 1 and 2 times a KL and gain, of which the oracle has 1.5 and 3 times: 1.5 / 3."""
    rows = [growing("product", 0.5, (s, 2 * s, 9 * s), kl=(s, 5 * s, 6 * s)).assign(strength=s) for s in (1.0, 2.0)]
    oracle = growing("oracle", 0.5, (3, 6, 27), kl=(1.5, 7.5, 9.0))
    summary = figures(cell("base", None), *rows, oracle)
    assert of(summary, "product", 0.5)["share_at_oracle_kl"] == sure(0.5)


@pytest.mark.parametrize(("kl", "reason"), [(50.0, "50 nats are below the rule's 100 to 300"), (400.0, "above")])
def test_outside_the_measured_kl_there_is_no_share_and_the_reason_is_told(kl, reason):
    rows = [cell("product", 0.5, (1, 1), strength=s, kl=value) for s, value in ((1.0, 100.0), (2.0, 300.0))]
    summary = figures(cell("base", None), *rows, cell("oracle", 0.5, (2, 2), kl=kl))
    product = of(summary, "product", 0.5)
    assert product["share_at_oracle_kl"] is None
    assert reason in product["unknown"]["share_at_oracle_kl"]
    assert product["share_of_oracle"] == sure(0.5)


def test_of_one_strength_or_without_kl_the_share_at_the_oracles_kl_is_unknown():
    oracle = cell("oracle", 0.5, (2, 2), kl=100.0)
    one = of(figures(cell("base", None), cell("product", 0.5, (1, 1), kl=50.0), oracle), "product", 0.5)
    assert one["unknown"] == {"share_at_oracle_kl": shares.ONE_STRENGTH}
    assert one["kl_of_oracle"] == sure(0.5)
    rows = [cell("code", 0.5, (1, 1), strength=s) for s in (1.0, 2.0)]
    code = of(figures(cell("base", None), *rows, oracle), "code", 0.5)
    assert code["unknown"] == {"share_at_oracle_kl": shares.NOT_MEASURED}
    assert code["kl_of_oracle"] is None


def test_a_table_of_an_earlier_version_without_kl_has_shares():
    rows = pd.concat([cell("base", None), cell("product", 0.5, (1, 1)), cell("oracle", 0.5, (2, 2))])
    product = of(summarise(rows.drop(columns="kl"), SETUP, draws=20), "product", 0.5)
    assert product["share_of_oracle"] == sure(0.5)
    assert product["kl_of_oracle"] is None


def test_a_summary_of_an_earlier_version_has_its_tables_and_findings():
    summary = summarise(measured(), SETUP, draws=20)
    earlier = {key: value for key, value in summary.items() if key not in ("without_oracle", "sets")}
    added = (*SHARES, "kl_of_oracle", "unknown", "training_images")
    earlier["cells"] = [{k: v for k, v in cell.items() if k not in added} for cell in summary["cells"]]
    earlier["rules"] = {r: {k: v for k, v in of.items() if k not in added} for r, of in summary["rules"].items()}
    assert findings(earlier) == [finding for finding in findings(summary) if finding.kind not in SHARES]
    for table in (cells_table, rules_table):
        shown = table(earlier)
        column = [figure.heading for figure in shown["columns"]].index("share of oracle")
        assert {row[column]["main"] for row in shown["rows"]} == {"—"}


# Findings and the page


def measured():
    """product at two strengths at two mixtures, of which one oracle has more KL, and joint at one."""
    rows = [cell("oracle", 0.5, (2, 2), kl=150.0), cell("oracle", 0.25, (4, 4), kl=900.0), cell("product", 1.0, (2, 0))]
    for share in (0.5, 0.25):
        rows += [cell("product", share, (s, s), strength=s, kl=100 * s) for s in (1.0, 2.0)]
    rows += [cell("joint", 1.0, (1.9, 0.5)), cell("joint", 0.5, (1.8, 1.8), kl=300.0), cell("joint", 0.75, (1, 1))]
    return pd.concat([cell("base", None), *rows])


def test_findings_say_at_which_weights_a_rule_has_which_share():
    found = {(f.kind, f.rule): f for f in findings(summarise(measured(), SETUP, draws=20)) if f.kind in SHARES}
    assert sorted(rule for _, rule in found) == ["joint", "product", "product"]
    product, joint = (found["share_of_oracle", rule] for rule in ("product", "joint"))
    assert product.value == sure((0.5 + 0.25) / 2)
    got = {weights: at["share_of_oracle"]["mean"] for weights, at in product.details["mixed"].items()}
    assert got == pytest.approx({"x=0.5,y=0.5": 0.5, "x=0.25,y=0.75": 0.25})
    assert not product.details["alone"]  # it is the oracle there
    assert joint.details["alone"]["x=1,y=0"]["share_of_oracle"] == sure(0.95)
    assert list(joint.details["mixed"]) == ["x=0.5,y=0.5"]
    equal = found["share_at_oracle_kl", "product"]
    assert equal.value == sure(0.75)
    assert list(equal.details["unknown"]) == ["x=0.25,y=0.75"]


def test_the_page_has_shares_their_reasons_and_the_weights_without_an_oracle(tmp_path):
    results = measured()
    write_report(tmp_path / "report.html", results, summarise(results, SETUP, draws=20), SETUP)
    page = (tmp_path / "report.html").read_text()
    for heading in ("share of oracle", "KL / oracle&#39;s", "share at its KL", "training images"):
        assert f">{heading}</button>" in page
    assert f"—<small>{shares.NO_ORACLE}</small>" in page
    assert "Weights without an oracle: x 0.75 · y 0.25<" in page
