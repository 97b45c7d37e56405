"""Fronts as SVG to stand in a page: every pair of objectives, every rule in its own marker and colour."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stepfuse.data.lettering import GLUE, printable
from stepfuse.rewards.registry import reward_unit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#6A3D9A", "#B2182B", "#4D9221", "#525252")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
SETTINGS = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "font.family": "sans-serif"}
FIXED = {"base": ("#000000", "h"), "oracle": ("#000000", "*")}
FAINT = 0.35  # opacity
FAINT_LABEL = "faint: another strength, or weight on a further objective"
BARS_LABEL = "bars: 95 % interval of the gain over the base"
LONGEST = 44  # characters of a line of an axis label
ACROSS = 3  # fronts beside each other in one picture


def axis_label(objective: str, reward: str) -> str:
    """An axis of mean rewards: the objective, its reward where it has another name, its unit, and what is better.

    The arrow points along the axis, upwards where the label is turned to stand beside a vertical axis.
    """
    unit = reward_unit(reward)
    name = (
        objective if objective == reward else f"{objective}: {textwrap.shorten(reward, 2 * LONGEST, placeholder='…')}"
    )
    better = f"({unit}, higher is better →)" if unit else "(higher is better →)"
    lines = textwrap.wrap(f"{name} {better.replace(' ', GLUE)}", LONGEST, break_on_hyphens=False)
    return "\n".join(lines).replace(GLUE, " ")


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


def keys(summary: dict) -> list[tuple[str, str]]:
    """What else a legend of the fronts explains: a small SVG and its text each, faint points only where there are."""
    svg = '<svg class="swatch" viewBox="-1.2 -1.2 2.4 2.4" width="14" height="14" aria-hidden="true">{}</svg>'
    faint = svg.format(f'<circle r="0.9" fill="#000" opacity="{FAINT}"/>')
    bars = svg.format('<path d="M-1.1 0H1.1M0 -1.1V1.1" stroke="#000" stroke-width="0.2"/>')
    return [(faint, FAINT_LABEL)] * has_faint(summary) + [(bars, BARS_LABEL)] * _has_bars(summary)


def _front(summary: dict, first: str, second: str, salt: str) -> str:
    """Mean rewards in natural units; bars are the intervals of the paired gain over the base, around the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": salt}), _glyphs_of_the_browser():
        figure, axes = pyplot.subplots(figsize=(4.6, 3.9), layout="constrained")
        _draw_front(axes, summary, first, second)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        pyplot.close(figure)
    label = f"Front between {first} and {second}: mean rewards of every rule at every weight; the table Cells has them"
    return _inline(file.getvalue(), salt, label)


def save_fronts(file: Path, summary: dict) -> None:
    """Save the fronts of every pair of objectives in one picture with a legend, for documents and cards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = list(combinations(summary["objectives"], 2))
    if not pairs:
        return
    across = min(ACROSS, len(pairs))
    down = -(-len(pairs) // across)
    with matplotlib.rc_context(SETTINGS):
        size = (4.6 * across, 4.0 * down)
        figure, grid = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        for axes in grid.flat[len(pairs) :]:
            axes.remove()
        for axes, pair in zip(grid.flat, pairs, strict=False):
            _draw_front(axes, summary, *pair, writable=printable)
        _add_legend(figure, summary)
        figure.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def has_faint(summary: dict) -> bool:
    """Whether some front has a faint point."""
    return any(
        not _is_main(cell, edge(summary["cells"], *pair))
        for pair in combinations(summary["objectives"], 2)
        for cell in summary["cells"]
    )


def _has_bars(summary: dict) -> bool:
    return any(values["gain"] for cell in summary["cells"] for values in cell["rewards"].values())


def _add_legend(figure: Any, summary: dict) -> None:
    """Below the fronts: every rule's marker, faint points and bars, in as many columns as the figure is wide."""
    from matplotlib.lines import Line2D

    marks: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=printable(rule))
        for rule, (colour, marker) in styles(list(summary["rules"])).items()
    ]
    if has_faint(summary):
        marks.append(Line2D([], [], color="black", marker="o", linestyle="", alpha=FAINT, label=FAINT_LABEL))
    if _has_bars(summary):
        marks.append(Line2D([], [], color="black", marker="+", ms=12, mew=0.8, linestyle="", label=BARS_LABEL))
    width, height = figure.get_size_inches()
    for columns in range(len(marks), 0, -1):
        legend = figure.legend(handles=marks, loc="outside lower center", ncols=columns, frameon=False)
        extent = legend.get_window_extent(figure.canvas.get_renderer())
        if columns == 1 or extent.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_size_inches(width, height + extent.height / figure.dpi)


def _draw_front(axes: Any, summary: dict, first: str, second: str, *, writable: Callable[[str], str] = str) -> None:
    for i, (rule, style) in enumerate(styles(list(summary["rules"])).items()):
        _draw_rule(axes, summary, rule, (first, second), style, f"rule-{i}")
    rewards = summary["objectives"]
    axes.set_xlabel(axis_label(writable(first), writable(rewards[first])))
    axes.set_ylabel(axis_label(writable(second), writable(rewards[second])))
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
        (line,) = axes.plot(*_means(cells, rewards), "-", color=colour, lw=1.3, alpha=FAINT if faint else 0.9)
        line.set_gid(f"{group}-line")
    for cell in own:
        main = _is_main(cell, on_edge)
        (x,), (y,) = _means([cell], rewards)
        bars = [_bars(cell["rewards"][reward]) for reward in rewards]
        drawn = axes.errorbar(
            x, y, xerr=bars[0], yerr=bars[1], fmt=marker, color=colour, ecolor=colour, elinewidth=0.8,
            ms=9 if rule in FIXED else 6, mec="white", mew=0.6, alpha=1.0 if main else FAINT, zorder=4 if main else 3,
        )  # fmt: skip
        for artist in drawn.get_children():
            artist.set_gid(f"{group}-point")


def _is_main(cell: dict, on_edge: Sequence[dict]) -> bool:
    """Whether a cell is drawn in full: the base, and the edge between the two objectives at strength 1."""
    return cell["rule"] == "base" or (cell["strength"] == 1 and cell in on_edge)


@contextmanager
def _glyphs_of_the_browser() -> Iterator[None]:
    """In an SVG the letters are the browser's: what matplotlib's font lacks is no matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


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
