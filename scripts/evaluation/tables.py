"""The tables of a report: a column for each figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepfuse.data.intervals import interval_text, number_text
from stepfuse.fuse.rules.weights import shown_weights
from stepfuse.scripts.evaluation.metric import Figure
from stepfuse.scripts.evaluation.metrics import METRICS, reward_metric, role_of

RULE = Figure(path=("rule",), heading="rule", description="How the adapters are combined")
_SCALED = "; Σ w·r/σ, w the weights, r the rewards, σ their units"
FRONTS = (
    Figure(path=("cells",), heading="cells", description="Number of weights and strengths measured"),
    Figure(
        path=("lacks",), heading="weights lacking",
        description="Of the weights that any rule was measured at, those this rule was not; listed below the table",
    ),
    Figure(
        path=("hypervolume",), heading="hypervolume",
        description="Volume between the cells' mean scaled rewards and the reference point; more is better",
    ),
    Figure(
        path=("matched", "over_product"), heading="− product, same cells", signed=True,
        description="Hypervolume minus product's, over the weights and strengths that both were measured at",
    ),
    Figure(path=("matched", "cells"), heading="same cells", description="Number of these weights and strengths"),
    Figure(
        path=("over_product",), heading="− product, all cells", signed=True,
        description="Hypervolume minus product's, each over all its cells: more cells make more volume",
    ),
    Figure(
        path=("igd",), heading="IGD",
        description="Mean distance, in scaled rewards, from the oracle's non-dominated cells to the nearest cell of "
        "the rule; less is better",
    ),
    Figure(
        path=("regret", "mean"), heading="mean regret",
        description="Mean of the regret at strength 1 over the mixed weights that an oracle was trained at; less is "
        "better",
    ),
    Figure(
        path=("regret", "over_product"), heading="regret − product", signed=True,
        description="Mean regret minus product's at the same weights; below 0 is better than product",
    ),
    Figure(
        path=("share_of_oracle", "mean"), heading="share of oracle",
        description="Mean share of the oracle's weighted gain at strength 1 over the mixed weights that an oracle was "
        "trained at; 1 is the oracle's",
    ),
    Figure(
        path=("share_at_oracle_kl", "mean"), heading="share at its KL",
        description="The same where the KL to the base is the oracle's, over the mixed weights at which strengths of "
        "the rule enclose it",
    ),
    Figure(
        path=("training_images",), heading="training images",
        description="Images that the training of the rule's adapters drew (of rule oracle, of the oracles); with DPO "
        "each candidate counts. Adapters trained together count once; unknown for imported ones",
    ),
)  # fmt: skip
MIXTURE = (
    RULE,
    Figure(path=("weights",), heading="weights", description="The share of each objective"),
    Figure(path=("strength",), heading="strength", description="λ: 0 is the base, 1 the trained strength"),
)
WEIGHTED_GAIN = Figure(
    path=("scalarised_gain",), heading="weighted gain", description=f"Gain over the base{_SCALED}", signed=True
)
COMPARISONS = (
    WEIGHTED_GAIN,
    Figure(
        path=("regret",), heading="regret", signed=True,
        description=f"What the oracle at these weights has more{_SCALED}, w as in its training; less is better. At one "
        "objective alone the oracle is that adapter itself unless another was trained",
    ),
    Figure(
        path=("over_product",), heading="− product", signed=True,
        description=f"More than product at the same weights and strength{_SCALED}",
    ),
    Figure(
        path=("share_of_oracle",), heading="share of oracle",
        description=f"Weighted gain divided by that of the oracle at these weights{_SCALED}; 1 is the oracle's. "
        "Unknown where the oracle is not clearly above the base. The oracle is that of the regret",
    ),
    Figure(
        path=("kl_of_oracle",), heading="KL / oracle's",
        description="Mean KL to the base as a multiple of that of the oracle at these weights",
    ),
    Figure(
        path=("share_at_oracle_kl",), heading="share at its KL",
        description="Share of the oracle's weighted gain that the rule has at the oracle's KL to the base, by linear "
        "interpolation between two of its strengths: the same for all strengths of a rule",
    ),
)  # fmt: skip


def rules_table(summary: dict) -> dict[str, Any]:
    """A row for each rule."""
    monotonicity = [
        Figure(
            path=("monotonicity", name),
            heading=f"ρ {name}",
            description=f"Spearman correlation of the weight of {name} with the mean of its reward, over the cells at "
            "strength 1; unknown for fewer than 3 different weights",
            places=2,
        )
        for name in summary["objectives"]
    ]
    metrics = [metric for metric in METRICS.values() if metric.of_rules]
    costs = [Figure(path=(metric.name,), heading=metric.title, description=metric.of_rules) for metric in metrics]
    grid = len(summary["grid"])
    rows = []
    for rule, figures in summary["rules"].items():
        lacks = len(figures["lacks"])
        shown = "—" if rule == "base" else f"{lacks} of {grid}" if lacks else "none"
        rows.append({**figures, "rule": rule, "lacks": (lacks, shown)})
    return table([RULE, *FRONTS, *monotonicity, *costs], rows)


def cells_table(summary: dict) -> dict[str, Any]:
    """A row for each cell."""
    rewards = [reward_metric(name, role=role_of(name, summary)) for name in summary["rewards"]]
    others = [metric for metric in METRICS.values() if metric.name in summary["cells"][0]]
    of_rewards, of_others = ([figure for m in metrics for figure in m.figures] for metrics in (rewards, others))
    figures = [*MIXTURE, *of_rewards, *COMPARISONS, *of_others]
    rows = [
        {**cell, "weights": shown_weights(cell["weights"]) if cell["weights"] else "—"}
        | {name: ("", "—", reason) for name, reason in cell.get("unknown", {}).items()}
        for cell in summary["cells"]
    ]
    return table([figure for figure in figures if figure.heading], rows)


def table(figures: Sequence[Figure], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns and entries as the page's template takes them."""
    return {"columns": figures, "rows": [[_entry(figure, figure.of(row)) for figure in figures] for row in rows]}


def _entry(figure: Figure, value: Any) -> dict[str, Any]:
    """What is shown, an interval's brackets apart, and what rows are sorted by.

    A tuple is a sort key, text and perhaps what stands in place of brackets.
    """
    sort, text, brackets = value, str(value), ""
    if value is None:
        sort, text = "", "—"
    elif isinstance(value, tuple):
        sort, text, *small = value
        brackets = "".join(small)
    elif isinstance(value, dict):
        sort = value["mean"]
        text, _, brackets = interval_text(value, signed=figure.signed).partition(" ")
    elif isinstance(value, float):
        text = number_text(value, figure.places) + figure.suffix
    return {"main": text, "range": brackets, "sort": sort, "number": not isinstance(value, str)}
