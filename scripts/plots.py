"""Fronts as SVG to stand in a page: every pair of objectives, every rule in its own marker and colour."""

import io
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#6A3D9A", "#B2182B", "#4D9221", "#525252")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
SETTINGS = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "font.family": "sans-serif"}
FIXED = {"base": ("#000000", "h"), "oracle": ("#000000", "*")}


def styles(rules: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Rule → colour and marker; base and oracle are black."""
    others = [rule for rule in rules if rule not in FIXED]
    drawn = {rule: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, rule in enumerate(others)}
    return {rule: FIXED.get(rule) or drawn[rule] for rule in rules}


def edge(cells: Sequence[dict], first: str, second: str) -> list[dict]:
    """Cells whose weights are on these two objectives alone, from all on the first to all on the second."""
    own = [c for c in cells if c["shares"] and c["shares"][first] + c["shares"][second] > 1 - 1e-6]
    return sorted(own, key=lambda cell: (cell["shares"][second], cell["strength"]))


def fronts(summary: dict) -> list[dict[str, str]]:
    """An SVG for every pair of objectives, with the two names."""
    return [
        {"first": first, "second": second, "svg": _front(summary, first, second, f"front-{i}")}
        for i, (first, second) in enumerate(combinations(summary["objectives"], 2))
    ]


def swatches(rules: Sequence[str]) -> dict[str, str]:
    """The marker of every rule as a small SVG, for a legend."""
    from matplotlib.markers import MarkerStyle

    svgs = {}
    for rule, (colour, marker) in styles(rules).items():
        style = MarkerStyle(marker)
        outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=np.float64)
        points = " ".join(f"{x:.2f},{-y:.2f}" for x, y in outline)
        svgs[rule] = (
            '<svg class="swatch" viewBox="-1.2 -1.2 2.4 2.4" width="14" height="14" aria-hidden="true">'
            f'<polygon points="{points}" transform="scale({1 / np.abs(outline).max():.3f})" '
            f'fill="{colour}"/></svg>'
        )
    return svgs


def _front(summary: dict, first: str, second: str, salt: str) -> str:
    """Mean rewards in natural units; bars are the intervals of the paired gain over the base, around the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": salt}):
        figure, axes = pyplot.subplots(figsize=(5.2, 4.2), layout="constrained")
        _draw_front(axes, summary, first, second)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        pyplot.close(figure)
    return _inline(file.getvalue(), salt, f"Front between {first} and {second}")


def save_fronts(file: Path, summary: dict) -> None:
    """The fronts of every pair of objectives in one picture, with a legend: for documents, the page has its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    pairs = list(combinations(summary["objectives"], 2))
    if not pairs:
        return
    marks = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=rule)
        for rule, (colour, marker) in styles(list(summary["rules"])).items()
    ]
    with matplotlib.rc_context(SETTINGS):
        figure, grid = pyplot.subplots(1, len(pairs), figsize=(4.6 * len(pairs), 4.4), layout="constrained")
        for axes, pair in zip(np.atleast_1d(grid), pairs, strict=True):
            _draw_front(axes, summary, *pair)
        figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 4 * len(pairs)), frameon=False)
        figure.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def _draw_front(axes: Any, summary: dict, first: str, second: str) -> None:
    for i, (rule, style) in enumerate(styles(list(summary["rules"])).items()):
        _draw_rule(axes, summary, rule, (first, second), style, f"rule-{i}")
    rewards = summary["objectives"]
    axes.set_xlabel(f"{first}: mean {rewards[first]}")
    axes.set_ylabel(f"{second}: mean {rewards[second]}")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.06)


def _draw_rule(axes: Any, summary: dict, rule: str, pair: tuple[str, str], style: tuple[str, str], group: str) -> None:
    """Cells on the edge are joined, at strength 1 in full ink; those off it and those of other strengths are faint."""
    rewards = [summary["objectives"][name] for name in pair]
    own = [c for c in summary["cells"] if c["rule"] == rule and all(c["rewards"][r]["mean"] for r in rewards)]
    on_edge = edge(own, *pair)
    colour, marker = style
    mixed = any(max(cell["shares"].values()) < 1 - 1e-6 for cell in own if cell["shares"])
    key = "strength" if mixed else "weights"  # a rule of single objectives goes along strengths
    lines: dict[object, list[dict]] = {}
    for cell in on_edge:
        lines.setdefault(cell[key], []).append(cell)
    for value, cells in lines.items():
        faint = key == "strength" and value != 1
        (line,) = axes.plot(*_means(cells, rewards), "-", color=colour, lw=1.3, alpha=0.35 if faint else 0.9)
        line.set_gid(f"{group}-line")
    for cell in own:
        main = rule == "base" or (cell in on_edge and cell["strength"] == 1)
        (x,), (y,) = _means([cell], rewards)
        bars = [_bars(cell["rewards"][reward]) for reward in rewards]
        drawn = axes.errorbar(
            x, y, xerr=bars[0], yerr=bars[1], fmt=marker, color=colour, ecolor=colour, elinewidth=0.8,
            ms=9 if rule in FIXED else 6, mec="white", mew=0.6, alpha=1.0 if main else 0.35, zorder=4 if main else 3,
        )  # fmt: skip
        for artist in drawn.get_children():
            artist.set_gid(f"{group}-point")


def _means(cells: Sequence[dict], rewards: Sequence[str]) -> tuple[list[float], list[float]]:
    x, y = ([cell["rewards"][reward]["mean"]["mean"] for cell in cells] for reward in rewards)
    return x, y


def _bars(figures: dict) -> list[list[float]] | None:
    gain = figures["gain"]
    return [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]] if gain else None


def _inline(svg: str, salt: str, label: str) -> str:
    """Only the element; its ids are its own in the page, and those of rules are classes."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'id="(rule-\d+)-\w+"', r'class="\1"', svg)
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{salt}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
