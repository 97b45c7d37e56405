"""What the figures of an evaluation say for and against product, in plain sentences; none is written beforehand."""

from collections.abc import Iterator
from math import floor, isfinite, log10

REWARDED = ("code", "rgg")  # they see the rewards while sampling
ASIDE = ("base", "oracle", *REWARDED)  # none is a rule that fuses
ROUNDING = 1e-12  # the same images summed in another order differ by less


def findings(summary: dict) -> list[str]:
    """Sentences computed from `summarise`'s figures."""
    sections = [_volumes, _regrets, _weak_oracles, _weights_lost, _rewarded]
    sections += [_cheapest, _monotone, _diversity, _held_out, _missing]
    return [sentence for section in sections for sentence in section(summary)]


def decimals(value: float, spread: float | None = None) -> int:
    """Two significant digits of the half width of an interval, or three of the value where it has none."""
    size, digits = (spread, 2) if spread and spread > 1e-9 * abs(value) else (abs(value), 3)
    return min(max(0, digits - 1 - floor(log10(size))), 6) if size and isfinite(size) else 0


def text(interval: dict | None, *, signed: bool = False) -> str:
    """An interval as "0.30 [0.25, 0.36]", in as many digits as its width warrants."""
    if interval is None:
        return "unknown"
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    known = low is not None and high is not None
    places = decimals(mean, (high - low) / 2 if known else None)
    if known and excludes_zero(interval) and not round(min(abs(low), abs(high)), places):
        places += 1  # a bound that is not 0 is not written as 0
    form = f"{'+' if signed else ''}.{places}f"
    shown = f"{mean:{form}} [{low:{form}}, {high:{form}}]" if known else f"{mean:{form}}"
    return shown.replace("-", "−")


def excludes_zero(interval: dict) -> bool:
    return interval["low"] is not None and (interval["low"] > ROUNDING or interval["high"] < -ROUNDING)


def _judged(interval: dict) -> str:
    """An interval, and whether it excludes 0."""
    if interval["low"] is None:
        return f"{text(interval, signed=True)} (no interval)"
    return f"{text(interval, signed=True)} ({'excludes' if excludes_zero(interval) else 'holds'} 0)"


def _volumes(summary: dict) -> Iterator[str]:
    rules = summary["rules"]
    if "product" not in rules:
        yield "There are no cells of rule product: nothing is compared with it."
        return
    for rule, figures in rules.items():
        over, matched = figures["over_product"], figures["matched"]
        if rule in ("base", "product") or over is None:
            continue
        lead = f"Hypervolume of {rule} minus that of product: "
        cells = f"over all cells, {figures['cells']} against {rules['product']['cells']}"
        fair = matched["over_product"] if matched and matched["mixed"] else None
        if matched is None or fair is None:
            yield f"{lead}{_judged(over)}, {cells}. No mixed weights at one strength are common to both."
        else:
            held = f"over the {matched['cells']} weights and strengths that both have"
            more = f"; {_judged(over)}, {cells}" if matched["cells"] < figures["cells"] else ""
            yield f"{lead}{_judged(fair)}, {held}{more}."


def _regrets(summary: dict) -> Iterator[str]:
    known = {
        rule: figures["regret"] for rule, figures in summary["rules"].items() if (figures["regret"] or {}).get("mean")
    }
    if not known:
        yield "No oracle was trained at any of the mixed weights: regret there is unknown."
        return
    count = max(regret["weights"] for regret in known.values())
    ranked = sorted((r for r in known if known[r]["weights"] == count), key=lambda r: known[r]["mean"]["mean"])
    best = ranked[0]
    sentence = f"Lowest mean regret over the {count} mixed weights with an oracle: {best}, {text(known[best]['mean'])}"
    if len(ranked) > 1:
        sentence += f"; next {ranked[1]}, {text(known[ranked[1]]['mean'])}"
    over = known[best]["over_product"]
    if over is not None:
        sentence += f". {best} minus product: {_judged(over)}"
    few = [f"{rule} ({regret['weights']})" for rule, regret in known.items() if regret["weights"] < count]
    yield sentence + (f". Left out for having fewer of these weights: {', '.join(few)}." if few else ".")


def _weak_oracles(summary: dict) -> Iterator[str]:
    for cell in summary["cells"]:
        gain = cell["scalarised_gain"]
        mixed = cell["shares"] and max(cell["shares"].values()) < 1 - 1e-6
        if cell["rule"] == "oracle" and cell["strength"] == 1 and mixed and gain and not (gain["low"] or 0) > ROUNDING:
            yield (
                f"The oracle at {cell['weights']} is not clearly above the base in the weighted reward, "
                f"{text(gain, signed=True)}: regret there says little."
            )


def _weights_lost(summary: dict) -> Iterator[str]:
    """Weights at which another rule that fuses has a weighted reward above product's, at strength 1."""
    rivals: dict[str, list[dict]] = {}
    for cell in summary["cells"]:
        if cell["over_product"] is not None and cell["strength"] == 1 and cell["rule"] not in ASIDE:
            rivals.setdefault(cell["weights"], []).append(cell)
    lost = {}
    for weights, cells in rivals.items():
        best = max(cells, key=lambda cell: cell["over_product"]["mean"])
        if best["over_product"]["mean"] > ROUNDING:
            lost[weights] = best
    if rivals:
        clear = sum(excludes_zero(cell["over_product"]) for cell in lost.values())
        yield (
            f"Among rules that fuse, product at strength 1 has the highest weighted reward at "
            f"{len(rivals) - len(lost)} of {len(rivals)} weights; another rule is above it at {len(lost)}, with an "
            f"interval that excludes 0 at {clear}. The best of several is chosen after looking, so these intervals "
            "flatter it."
        )
    for weights, cell in lost.items():
        over = cell["over_product"]
        yield f"Not product but {cell['rule']} is best at {weights}: by {_judged(over)}."


def _rewarded(summary: dict) -> Iterator[str]:
    """What seeing the rewards while sampling gains over product, and what it costs."""
    for cell in summary["cells"]:
        over, one = cell["over_product"], cell["of_one_adapter"]
        if cell["rule"] in REWARDED and over is not None:
            cost = "" if one["seconds"] is None else f", at {one['seconds']:.3g} × the seconds of one adapter"
            held = [
                f"{reward} {text(gain, signed=True)} against the base"
                for reward in summary["held_out"]
                if (gain := cell["rewards"][reward]["gain"]) is not None
            ]
            told = f"; held out, {', '.join(held)}" if held else ""
            yield (
                f"{cell['rule']}, which sees the rewards while sampling, at {cell['weights']}: weighted reward minus "
                f"product's {_judged(over)}{cost}{told}."
            )


def _cheapest(summary: dict) -> Iterator[str]:
    cheaper = {}
    for rule, figures in summary["rules"].items():
        matched = figures["matched"]
        if rule in ASIDE or not matched or not matched["mixed"] or not matched["over_product"]:
            continue
        if matched["nfe_ratio"] is not None and matched["nfe_ratio"] < 1:
            cheaper[rule] = matched
    within = {
        r: m
        for r, m in cheaper.items()
        if m["over_product"]["high"] is not None and m["over_product"]["high"] >= -ROUNDING
    }
    if within:
        rule, matched = min(within.items(), key=lambda item: item[1]["nfe_ratio"])
        seconds = "" if matched["seconds_ratio"] is None else f" and {matched['seconds_ratio']:.2f} × its seconds"
        yield (
            f"The cheapest rule within noise of product is {rule}: {matched['nfe_ratio']:.2f} × its network "
            f"evaluations{seconds}, hypervolume {text(matched['over_product'], signed=True)} over {matched['cells']} "
            "cells of the same weights and strength. Within noise is not shown to be equal."
        )
    elif cheaper:
        yield f"Every rule cheaper than product has a hypervolume below its, beyond noise: {', '.join(cheaper)}."
    elif "product" in summary["rules"]:
        yield "No rule with mixed weights in common with product is cheaper than product."


def _monotone(summary: dict) -> Iterator[str]:
    for rule, figures in summary["rules"].items():
        known = {name: value for name, value in figures["monotonicity"].items() if value is not None}
        if rule == "product" and known:
            values = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
            yield f"product at strength 1: rank correlation of weight and mean reward {values}.".replace("-", "−")


def _diversity(summary: dict) -> Iterator[str]:
    ratios = [c["diversity_ratio"]["mean"] for c in _product(summary) if c["diversity_ratio"] is not None]
    if ratios:
        yield f"Diversity of product's cells at strength 1: {min(ratios):.2f} to {max(ratios):.2f} × the base's."


def _held_out(summary: dict) -> Iterator[str]:
    for reward in summary["held_out"]:
        gains = [c["rewards"][reward]["gain"] for c in _product(summary) if c["rewards"][reward]["gain"] is not None]
        if gains:
            clear = [gain for gain in gains if excludes_zero(gain)]
            below = sum(gain["mean"] < 0 for gain in clear)
            yield (
                f"{reward}, which nothing was trained on, against the base in product's {len(gains)} cells at strength "
                f"1: lower in {below}, higher in {len(clear) - below}, within noise in {len(gains) - len(clear)}."
            )


def _missing(summary: dict) -> Iterator[str]:
    for reward in summary["rewards"]:
        holes = {i: cell["rewards"][reward]["missing"] for i, cell in enumerate(summary["cells"])}
        if total := sum(holes.values()):
            cells = sum(count > 0 for count in holes.values())
            yield f"{total} images, in {cells} cells, have no finite {reward} and are left out of its figures."


def _product(summary: dict) -> list[dict]:
    return [cell for cell in summary["cells"] if cell["rule"] == "product" and cell["strength"] == 1]
