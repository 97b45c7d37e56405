"""What the figures of an evaluation show for and against product, as facts; `findings.j2` puts them into words."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stepfuse.data.intervals import ROUNDING, excludes_zero
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.evaluation.setup import Rules


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact that follows from the figures.

    Attributes:
        kind: the macro of `findings.j2` that words it.
        rule: the label of the rule that it is about.
        metric: what was measured of it.
        value: an interval, of the rule's difference from product or the base, or of the rule alone; None for a fact of
            counts and ratios.
        details: the weights, costs and counts of its kind.
    """

    kind: str
    rule: str
    metric: str
    value: dict | None
    details: Mapping[str, Any]


def findings(summary: dict, rules: Rules = RULES) -> list[Finding]:
    """Facts computed from the figures of `summarise`.

    Args:
        rules: by the label that cells have for them; other labels are taken for rules that fuse.
    """
    labels = {label: rules.get(label, FusionRule) for label in summary["rules"]}
    rewarded = [label for label, rule in labels.items() if rule.needs]  # they see the rewards while sampling
    fusing = [label for label, rule in labels.items() if not rule.needs and rule.accepts not in ("none", "trained")]
    return [
        *_volumes(summary),
        *_regrets(summary),
        *_weak_oracles(summary),
        *_best_weights(summary, fusing),
        *_rewarded(summary, rewarded),
        *_cheapest(summary, fusing),
        *_monotone(summary),
        *_diversity(summary),
        *_held_out(summary),
        *_missing(summary),
    ]


def _fact(kind: str, rule: str = "product", metric: str = "", value: dict | None = None, /, **details: Any) -> Finding:
    return Finding(kind=kind, rule=rule, metric=metric, value=value, details=details)


def _volumes(summary: dict) -> Iterator[Finding]:
    """The hypervolume of every rule minus product's: over the same weights where some are mixed, else over all."""
    rules = summary["rules"]
    if "product" not in rules:
        yield _fact("no_product")
        return
    for rule, figures in rules.items():
        over, matched = figures["over_product"], figures["matched"]
        if rule in ("base", "product") or over is None:
            continue
        same = matched["over_product"] if matched and matched["mixed"] else None
        yield _fact(
            "hypervolume",
            rule,
            "hypervolume",
            same or over,
            matched=matched["cells"] if same else None,
            all_cells=over if same and matched["cells"] < figures["cells"] else None,
            cells=figures["cells"],
            product_cells=rules["product"]["cells"],
        )


def _regrets(summary: dict) -> Iterator[Finding]:
    """The lowest mean regret, of the rules that were measured at the most weights with an oracle."""
    regrets = {rule: figures["regret"] for rule, figures in summary["rules"].items()}
    known = {rule: regret for rule, regret in regrets.items() if regret and regret["mean"]}
    if not known:
        yield _fact("no_oracle")
        return
    count = max(regret["weights"] for regret in known.values())
    lowest, *others = sorted(
        (rule for rule in known if known[rule]["weights"] == count), key=lambda rule: known[rule]["mean"]["mean"]
    )
    yield _fact(
        "lowest_regret",
        lowest,
        "regret",
        known[lowest]["mean"],
        weights=count,
        next=[(rule, known[rule]["mean"]) for rule in others[:1]],
        over_product=known[lowest]["over_product"],
        fewer_weights={rule: regret["weights"] for rule, regret in known.items() if regret["weights"] < count},
    )


def _weak_oracles(summary: dict) -> Iterator[Finding]:
    """Oracles that are not clearly above the base, so that regret says little."""
    for cell in summary["cells"]:
        gain = cell["scalarised_gain"]
        mixed = cell["shares"] and max(cell["shares"].values()) < 1 - 1e-6
        if cell["rule"] == "oracle" and cell["strength"] == 1 and mixed and gain and not (gain["low"] or 0) > ROUNDING:
            yield _fact("weak_oracle", "oracle", "scalarised_gain", gain, weights=cell["weights"])


def _best_weights(summary: dict, fusing: list[str]) -> Iterator[Finding]:
    """At how many weights product is best of the rules that fuse, at strength 1, and which rule is best elsewhere."""
    others: dict[str, list[dict]] = {}
    for cell in summary["cells"]:
        if cell["over_product"] is not None and cell["strength"] == 1 and cell["rule"] in fusing:
            others.setdefault(cell["weights"], []).append(cell)
    best = [max(cells, key=lambda cell: cell["over_product"]["mean"]) for cells in others.values()]
    lost = [cell for cell in best if cell["over_product"]["mean"] > ROUNDING]
    if others:
        counts = {"weights": len(others), "won": len(others) - len(lost), "lost": len(lost)}
        resolved = sum(excludes_zero(cell["over_product"]) for cell in lost)
        yield _fact("weights_won", "product", "over_product", resolved=resolved, **counts)
    for cell in lost:
        yield _fact("better_rule", cell["rule"], "over_product", cell["over_product"], weights=cell["weights"])


def _rewarded(summary: dict, rewarded: list[str]) -> Iterator[Finding]:
    """What seeing the rewards while sampling gains over product, and what it costs."""
    for cell in summary["cells"]:
        if cell["rule"] in rewarded and cell["over_product"] is not None:
            gains = {reward: cell["rewards"][reward]["gain"] for reward in summary["held_out"]}
            yield _fact(
                "rewarded",
                cell["rule"],
                "over_product",
                cell["over_product"],
                weights=cell["weights"],
                seconds=cell["of_one_adapter"].get("seconds"),
                held_out={reward: gain for reward, gain in gains.items() if gain is not None},
            )


def _cheapest(summary: dict, fusing: list[str]) -> Iterator[Finding]:
    """The rule of the fewest network evaluations whose hypervolume is not clearly below product's."""
    cheaper = {}
    for rule, figures in summary["rules"].items():
        matched = figures["matched"]
        comparable = rule in fusing and matched and matched["mixed"] and matched["over_product"]
        if comparable and (matched.get("nfe_ratio") or 1) < 1:
            cheaper[rule] = matched
    bounds = {rule: matched["over_product"]["high"] for rule, matched in cheaper.items()}
    if within := [rule for rule, high in bounds.items() if high is not None and high >= -ROUNDING]:
        rule = min(within, key=lambda rule: cheaper[rule]["nfe_ratio"])
        matched = cheaper[rule]
        costs = {"nfe": matched["nfe_ratio"], "seconds": matched.get("seconds_ratio"), "cells": matched["cells"]}
        yield _fact("cheapest", rule, "hypervolume", matched["over_product"], **costs)
    elif cheaper:
        yield _fact("cheaper_is_worse", "product", "hypervolume", rules=list(cheaper))
    elif "product" in summary["rules"]:
        yield _fact("none_cheaper")


def _monotone(summary: dict) -> Iterator[Finding]:
    if "product" in summary["rules"]:
        figures = summary["rules"]["product"]["monotonicity"]
        if known := {name: value for name, value in figures.items() if value is not None}:
            yield _fact("monotonicity", "product", "monotonicity", **known)


def _diversity(summary: dict) -> Iterator[Finding]:
    ratios = [cell["diversity_ratio"]["mean"] for cell in _product(summary) if cell.get("diversity_ratio")]
    if ratios:
        yield _fact("diversity", "product", "diversity_ratio", low=min(ratios), high=max(ratios))


def _held_out(summary: dict) -> Iterator[Finding]:
    for reward in summary["held_out"]:
        gains = [c["rewards"][reward]["gain"] for c in _product(summary) if c["rewards"][reward]["gain"] is not None]
        if gains:
            clear = [gain for gain in gains if excludes_zero(gain)]
            lower = sum(gain["mean"] < 0 for gain in clear)
            counts = {"lower": lower, "higher": len(clear) - lower, "within_noise": len(gains) - len(clear)}
            yield _fact("held_out", "product", reward, cells=len(gains), **counts)


def _missing(summary: dict) -> Iterator[Finding]:
    for reward in summary["rewards"]:
        counts = [cell["rewards"][reward]["missing"] for cell in summary["cells"]]
        if any(counts):
            yield _fact("missing", "product", reward, images=sum(counts), cells=sum(count > 0 for count in counts))


def _product(summary: dict) -> list[dict]:
    return [cell for cell in summary["cells"] if cell["rule"] == "product" and cell["strength"] == 1]
