"""What the figures of an evaluation show for and against product, as facts; `findings.j2` puts them into words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepfuse.data.intervals import ROUNDING, excludes_zero
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.evaluation.config import Rules

# Two rules that are the same adapter, as with all the weight on one, differ by less, in units of the rewards' scales:
# their sums are in another order, and pixels are rounded to 8 bits.
EQUAL = 1e-4


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact that follows from the figures.

    Attributes:
        kind: the macro of `findings.j2` that words it.
        rule, reward: what it is about, the rule by its label.
        value: an interval, of the rule's difference from product or the base, or of the rule alone, if there is one.
        details: the weights, costs and counts of its kind.
    """

    kind: str
    rule: str = "product"
    reward: str = ""
    value: dict | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def findings(summary: dict, rules: Rules = RULES) -> list[Finding]:
    """Facts computed from the figures of `summarise`; labels that `rules` lacks are taken for rules that fuse."""
    labels = {label: rules.get(label, FusionRule) for label in summary["rules"]}
    rewarded = [label for label, rule in labels.items() if rule.needs]  # they see the rewards while sampling
    fusing = [label for label, rule in labels.items() if not rule.needs and rule.accepts not in ("none", "trained")]
    return [
        *_volumes(summary["rules"]),
        *_regrets(summary["rules"]),
        *_weak_oracles(summary["cells"]),
        *_shares(summary),
        *_best_weights([cell for cell in summary["cells"] if cell["rule"] in fusing]),
        *_rewarded([cell for cell in summary["cells"] if cell["rule"] in rewarded], summary["held_out"]),
        *_cheapest(summary["rules"], fusing),
        *_of_product(summary),
        *_missing(summary),
    ]


def _volumes(rules: dict[str, dict]) -> Iterator[Finding]:
    """The hypervolume of every rule minus product's: over the same weights where some are mixed, else over all."""
    if "product" not in rules:
        yield Finding(kind="no_product")
        return
    for rule, figures in rules.items():
        over, matched = figures["over_product"], figures["matched"]
        if rule in ("base", "product") or over is None:
            continue
        same = matched["over_product"] if matched and matched["mixed"] else None
        details = {
            "matched": matched["cells"] if same else None,
            "all_cells": over if same and matched["cells"] < figures["cells"] else None,
            "cells": figures["cells"],
            "product_cells": rules["product"]["cells"],
        }
        yield Finding(kind="hypervolume", rule=rule, value=same or over, details=details)


def _regrets(rules: dict[str, dict]) -> Iterator[Finding]:
    """The lowest mean regret, of the rules that were measured at the most weights with an oracle."""
    known = {rule: regret for rule, figures in rules.items() if (regret := figures["regret"]) and regret["mean"]}
    if not known:
        yield Finding(kind="no_oracle")
        return
    count = max(regret["weights"] for regret in known.values())
    compared = [rule for rule in known if known[rule]["weights"] == count]
    lowest, *others = sorted(compared, key=lambda rule: known[rule]["mean"]["mean"])
    details = {
        "weights": count,
        "next": [(rule, known[rule]["mean"]) for rule in others[:1]],
        "over_product": known[lowest]["over_product"],
        "fewer_weights": {rule: regret["weights"] for rule, regret in known.items() if regret["weights"] < count},
    }
    yield Finding(kind="lowest_regret", rule=lowest, value=known[lowest]["mean"], details=details)


def _weak_oracles(cells: Sequence[dict]) -> Iterator[Finding]:
    """Oracles that are not clearly above the base, so that regret says little."""
    for cell in cells:
        gain = cell["scalarised_gain"]
        mixed = cell["shares"] and max(cell["shares"].values()) < 1 - 1e-6
        if cell["rule"] == "oracle" and cell["strength"] == 1 and mixed and gain and not (gain["low"] or 0) > ROUNDING:
            yield Finding(kind="weak_oracle", rule="oracle", value=gain, details={"weights": cell["weights"]})


def _shares(summary: dict) -> Iterator[Finding]:
    """The share of the oracle's gain that every rule has: at strength 1 by weights, and at the oracle's KL."""
    images = {rule: figures.get("training_images") for rule, figures in summary["rules"].items()}
    for rule, figures in summary["rules"].items():
        held = [cell for cell in summary["cells"] if cell["rule"] == rule and cell["shares"] and cell["oracle"]]
        full = [cell for cell in held if cell["strength"] == 1]
        mixed = {cell["weights"]: cell for cell in held if max(cell["shares"].values()) < 1 - 1e-6}
        for kind, cells in (("share_of_oracle", full), ("share_at_oracle_kl", held)):
            mean = figures.get(kind)
            if rule == "oracle" or not mean:
                continue
            at = {cell["weights"]: cell for cell in cells}
            details = {
                "weights": mean["weights"],
                "mixed": {w: cell for w, cell in at.items() if w in mixed and cell[kind]},
                "alone": {w: cell for w, cell in at.items() if w not in mixed and _differs(cell[kind])},
                "unknown": {w: cell["unknown"][kind] for w, cell in at.items() if w in mixed and not cell[kind]},
                "images": images[rule],
                "of_oracles": images.get("oracle"),
            }
            yield Finding(kind=kind, rule=rule, value=mean["mean"], details=details)


def _differs(share: dict | None) -> bool:
    """Whether a share is not exactly 1, as that of the adapter that is the oracle itself."""
    return share is not None and any(value is not None and abs(value - 1) > ROUNDING for value in share.values())


def _best_weights(fused: Sequence[dict]) -> Iterator[Finding]:
    """At how many weights product is best of the rules that fuse, at strength 1, and which rule is best elsewhere."""
    others: dict[str, list[dict]] = {}
    for cell in fused:
        if cell["over_product"] is not None and cell["strength"] == 1:
            others.setdefault(cell["weights"], []).append(cell)
    best = [max(cells, key=lambda cell: cell["over_product"]["mean"]) for cells in others.values()]
    lost = [cell for cell in best if cell["over_product"]["mean"] > EQUAL]
    if others:
        details = {"weights": len(others), "won": len(others) - len(lost), "lost": len(lost)}
        details["resolved"] = sum(excludes_zero(cell["over_product"]) for cell in lost)
        yield Finding(kind="weights_won", details=details)
    for cell in lost:
        details = {"weights": cell["weights"]}
        yield Finding(kind="better_rule", rule=cell["rule"], value=cell["over_product"], details=details)


def _rewarded(cells: Sequence[dict], held_out: Sequence[str]) -> Iterator[Finding]:
    """What seeing the rewards while sampling gains over product, and what it costs."""
    for cell in cells:
        if cell["over_product"] is not None:
            gains = {reward: cell["rewards"][reward]["gain"] for reward in held_out}
            details = {
                "weights": cell["weights"],
                "seconds": cell["of_one_adapter"].get("seconds"),
                "held_out": {reward: gain for reward, gain in gains.items() if gain is not None},
            }
            yield Finding(kind="rewarded", rule=cell["rule"], value=cell["over_product"], details=details)


def _cheapest(rules: dict[str, dict], fusing: Sequence[str]) -> Iterator[Finding]:
    """The rule of the fewest network evaluations whose hypervolume is not clearly below product's."""
    cheaper = {}
    for rule in fusing:
        matched = rules[rule]["matched"]
        comparable = matched and matched["mixed"] and matched["over_product"]
        if comparable and (matched.get("nfe_ratio") or 1) < 1:
            cheaper[rule] = matched
    bounds = {rule: matched["over_product"]["high"] for rule, matched in cheaper.items()}
    if within := [rule for rule, high in bounds.items() if high is not None and high >= -ROUNDING]:
        rule = min(within, key=lambda rule: cheaper[rule]["nfe_ratio"])
        matched = cheaper[rule]
        costs = {"nfe": matched["nfe_ratio"], "seconds": matched.get("seconds_ratio"), "cells": matched["cells"]}
        yield Finding(kind="cheapest", rule=rule, value=matched["over_product"], details=costs)
    elif cheaper:
        yield Finding(kind="cheaper_is_worse", details={"rules": list(cheaper)})
    elif "product" in rules:
        yield Finding(kind="none_cheaper")


def _of_product(summary: dict) -> Iterator[Finding]:
    """Product at strength 1: whether rewards follow the weights, its diversity, and its held-out rewards."""
    if "product" in summary["rules"]:
        figures = summary["rules"]["product"]["monotonicity"]
        if known := {name: value for name, value in figures.items() if value is not None}:
            yield Finding(kind="monotonicity", details=known)
    cells = [cell for cell in summary["cells"] if cell["rule"] == "product" and cell["strength"] == 1]
    if ratios := [cell["diversity_ratio"]["mean"] for cell in cells if cell.get("diversity_ratio")]:
        yield Finding(kind="diversity", details={"low": min(ratios), "high": max(ratios)})
    for reward in summary["held_out"]:
        if gains := [gain for cell in cells if (gain := cell["rewards"][reward]["gain"]) is not None]:
            clear = [gain for gain in gains if excludes_zero(gain)]
            lower = sum(gain["mean"] < 0 for gain in clear)
            counts = {"cells": len(gains), "lower": lower, "higher": len(clear) - lower}
            counts |= {"within_noise": len(gains) - len(clear), "judge": reward in summary["judges"]}
            yield Finding(kind="held_out", reward=reward, details=counts)


def _missing(summary: dict) -> Iterator[Finding]:
    for reward in summary["rewards"]:
        counts = [cell["rewards"][reward]["missing"] for cell in summary["cells"]]
        if any(counts):
            details = {"images": sum(counts), "cells": sum(count > 0 for count in counts)}
            yield Finding(kind="missing", reward=reward, details=details)
