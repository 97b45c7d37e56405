"""The columns of a report's tables: heading, definition, and what they show of a cell or rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stepfuse.rewards.registry import reward_unit
from stepfuse.scripts.evaluation.findings import decimals, text


@dataclass(frozen=True, kw_only=True)
class Column:
    """`show` gives the text; `sort` what rows are ordered by, None last."""

    head: str
    title: str
    show: Callable[[dict], str]
    sort: Callable[[dict], float | str | None]


def table(columns: Sequence[Column], rows: Sequence[dict]) -> dict[str, Any]:
    """Heads and cells, ready to be written; an interval's brackets are apart from its number."""
    return {"heads": [{"head": c.head, "title": c.title} for c in columns], "rows": [_row(columns, r) for r in rows]}


def rule_columns(summary: dict) -> list[Column]:
    grid = len(summary["grid"])
    return [
        _plain("rule", "How the adapters are combined", lambda r: r["rule"]),
        _count("cells", "Number of weights and strengths measured", lambda r: r["cells"]),
        Column(
            head="weights lacking",
            title="Of the weights that any rule was measured at, those this rule was not; listed below the table",
            show=lambda r: "—" if r["rule"] == "base" else f"{len(r['lacks'])} of {grid}" if r["lacks"] else "none",
            sort=lambda r: len(r["lacks"]),
        ),
        _interval(
            "hypervolume", "Volume between the cells' mean scaled rewards and the reference point; more is better",
            lambda r: r["hypervolume"],
        ),
        _interval(
            "− product, same cells",
            "Hypervolume minus product's, over the weights and strengths that both were measured at",
            lambda r: r["matched"] and r["matched"]["over_product"],
            signed=True,
        ),
        _count("same cells", "Number of these weights and strengths", lambda r: r["matched"] and r["matched"]["cells"]),
        _interval(
            "− product, all cells",
            "Hypervolume minus product's, each over all its cells: more cells make more volume",
            lambda r: r["over_product"],
            signed=True,
        ),
        _interval(
            "IGD", "Mean distance, in scaled rewards, from the oracle's non-dominated cells to the nearest cell of the "
            "rule; less is better", lambda r: r["igd"],
        ),
        _interval(
            "mean regret",
            "Mean of the regret at strength 1 over the mixed weights that an oracle was trained at; less is better",
            lambda r: r["regret"] and r["regret"]["mean"],
        ),
        _interval(
            "regret − product", "Mean regret minus product's at the same weights; below 0 is better than product",
            lambda r: r["regret"] and r["regret"]["over_product"],
            signed=True,
        ),
        *[
            _number(
                f"ρ {name}",
                f"Spearman correlation of the weight of {name} with the mean of its reward, over the cells at "
                "strength 1; unknown for fewer than 3 different weights",
                lambda r, name=name: r["monotonicity"][name],
                places=2,
            )
            for name in summary["objectives"]
        ],
        _number("NFE", "Network evaluations an image, mean over the cells", lambda r: r["nfe"]),
        _number("s / image", "Seconds an image, median over the cells' medians", lambda r: r["seconds"]),
    ]  # fmt: skip


def cell_columns(summary: dict) -> list[Column]:
    unit = "; Σ w·r/σ, w the weights, r the rewards, σ their units"
    columns = [
        _plain("rule", "How the adapters are combined", lambda c: c["rule"]),
        _plain("weights", "The share of each objective", lambda c: c["weights"].replace(",", ", ") or "—"),
        _number("strength", "λ: 0 is the base, 1 the trained strength", lambda c: c["strength"]),
    ]
    for reward in summary["rewards"]:
        measured_in = reward_unit(reward)
        unit_of = f", {measured_in}" if measured_in else ""
        note = " (held out: nothing was trained on it)" if reward in summary["held_out"] else ""
        columns += [
            _interval(
                reward, f"Mean {reward} of the images{unit_of}; higher is better{note}",
                lambda c, r=reward: c["rewards"][r]["mean"],
            ),
            _interval(
                f"{reward} gain",
                f"Mean of {reward} minus the base's at the same prompt and seed{unit_of}{note}",
                lambda c, r=reward: c["rewards"][r]["gain"],
                signed=True,
            ),
            _interval(
                f"{reward} wins",
                f"Share of images with a higher {reward} than the base's of the same prompt and seed, ties half{note}",
                lambda c, r=reward: c["rewards"][r]["wins"],
            ),
        ]  # fmt: skip
    columns += [
        _interval("weighted gain", f"Gain over the base{unit}", lambda c: c["scalarised_gain"], signed=True),
        _interval(
            "regret", f"What the oracle at these weights has more{unit}, w as in its training; less is better. At one "
            "objective alone the oracle is that adapter itself unless another was trained", lambda c: c["regret"],
            signed=True,
        ),
        _interval(
            "− product", f"More than product at the same weights and strength{unit}", lambda c: c["over_product"],
            signed=True,
        ),
        _interval("diversity", "Mean distance between embeddings of a prompt's images", lambda c: c["diversity"]),
        _interval("diversity / base", "Diversity as a multiple of the base's", lambda c: c["diversity_ratio"]),
        _interval("KL", "Mean divergence of the path from the base's (Kullback-Leibler), nats", lambda c: c["kl"]),
    ]  # fmt: skip
    for key, head, title in (
        ("nfe", "NFE", "Network evaluations an image"),
        ("seconds", "s / image", "Seconds an image in its batch, median"),
        ("seconds_p95", "s / image, p95", "Seconds an image in its batch, 95th percentile"),
        ("peak_memory_mb", "MB", "Peak memory, MB"),
    ):
        columns.append(_number(head, title, lambda c, key=key: c[key]))
        if key != "seconds_p95":
            told = f"{title}, as a multiple of one adapter's: product at strength 1, all weight on one objective"
            columns.append(
                _number(f"{head} / one", told, lambda c, key=key: c["of_one_adapter"][key], places=2, suffix=" ×")
            )
    return columns


def _row(columns: Sequence[Column], row: dict) -> list[dict[str, Any]]:
    cells = []
    for column in columns:
        shown, sort = column.show(row), column.sort(row)
        main, bracket, rest = shown.partition(" [")
        split = isinstance(sort, float) and bool(bracket)
        cells.append(
            {
                "main": main if split else shown,
                "range": f"[{rest}" if split else "",
                "sort": "" if sort is None else sort,
                "number": not isinstance(sort, str),
            }
        )
    return cells


def _plain(head: str, title: str, get: Callable[[dict], str]) -> Column:
    return Column(head=head, title=title, show=get, sort=get)


def _count(head: str, title: str, get: Callable[[dict], int | None]) -> Column:
    return Column(head=head, title=title, show=lambda row: "—" if get(row) is None else str(get(row)), sort=get)


def _number(
    head: str, title: str, get: Callable[..., float | None], *, places: int | None = None, suffix: str = ""
) -> Column:
    def show(row: dict) -> str:
        value = get(row)
        if value is None:
            return "—"
        digits = decimals(value) if places is None else places
        trimmed = f"{value:.{digits}f}"
        if places is None and "." in trimmed:
            trimmed = trimmed.rstrip("0").rstrip(".")
        return trimmed.replace("-", "−") + suffix

    return Column(head=head, title=title, show=show, sort=get)


def _interval(head: str, title: str, get: Callable[..., dict | None], *, signed: bool = False) -> Column:
    def show(row: dict) -> str:
        interval = get(row)
        return "—" if interval is None else text(interval, signed=signed)

    def sort(row: dict) -> float | None:
        interval = get(row)
        return None if interval is None else interval["mean"]

    return Column(head=head, title=title, show=show, sort=sort)
