"""Plots for the page as SVG, and the fronts as one picture: every rule has a marker and a colour."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stepfuse.data.intervals import half_lengths
from stepfuse.data.lettering import GLUE, drawable
from stepfuse.data.output_file import atomic_file
from stepfuse.rewards.registry import reward_unit
from stepfuse.scripts.evaluation.metric import Metric
from stepfuse.scripts.evaluation.metrics import METRICS
from stepfuse.scripts.evaluation.tables import WEIGHTED_GAIN

Style = tuple[str, str]  # colour and marker
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#6A3D9A", "#B2182B", "#4D9221", "#525252")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
SETTINGS = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "font.family": "sans-serif"}
FIXED = {"base": ("#000000", "h"), "oracle": ("#000000", "*")}
FAINT = 0.35  # opacity
LABELS = {
    "faint": "faint: another strength, or weight on a further objective",
    "bars": "bars: 95 % interval of the gain over the base",
}
LONGEST = 44  # characters of a line of an axis label
ACROSS = 3  # fronts beside each other in one picture


def axis_label(objective: str, reward: str) -> str:
    """An axis of mean rewards: the objective, its reward where it has another name, its unit, and what is better.

    The arrow points along the axis, upwards where the label is turned to stand beside a vertical axis.
    """
    unit = reward_unit(reward)
    shown = textwrap.shorten(reward, 2 * LONGEST, placeholder="…")
    name = objective if objective == reward else f"{objective}: {shown}"
    better = f"({unit}, higher is better →)" if unit else "(higher is better →)"
    lines = textwrap.wrap(f"{name} {better.replace(' ', GLUE)}", LONGEST, break_on_hyphens=False)
    return "\n".join(lines).replace(GLUE, " ")


def styles(rules: Collection[str]) -> dict[str, Style]:
    """Rule → colour and marker; base and oracle are black."""
    others = [rule for rule in rules if rule not in FIXED]
    drawn = {rule: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, rule in enumerate(others)}
    return {rule: FIXED.get(rule) or drawn[rule] for rule in rules}


def edge(cells: Sequence[dict], first: str, second: str) -> list[dict]:
    """Cells whose weights are on these two objectives alone, from all on the first to all on the second."""
    between = [c for c in cells if c["shares"] and c["shares"][first] + c["shares"][second] > 1 - 1e-6]
    return sorted(between, key=lambda cell: (cell["shares"][second], cell["strength"]))


def plots(summary: dict) -> Iterator[dict[str, str]]:
    """The title and SVG of the front of every pair of objectives, then of every plotted metric that was measured."""
    for i, pair in enumerate(combinations(summary["objectives"], 2)):
        label = f"Front between {pair[0]} and {pair[1]}: mean rewards of every rule at every weight"
        svg = _svg(partial(_draw_front, summary=summary, pair=pair), f"front-{i}", label)
        yield {"title": " against ".join(pair), "svg": svg}
    for metric in METRICS.values():
        if metric.plotted and any(metric.figure.of(cell) is not None for cell in summary["cells"]):
            title = f"weighted gain against {metric.title}"
            svg = _svg(partial(_draw_metric, summary=summary, metric=metric), f"metric-{metric.name}", title)
            yield {"title": title, "svg": svg}


def swatches(summary: dict) -> Iterator[dict[str, str]]:
    """The marker of every rule as the outline of an SVG's polygon within [-1, 1]², for the page's legend."""
    from matplotlib.markers import MarkerStyle

    for rule, (colour, marker) in styles(summary["rules"]).items():
        style = MarkerStyle(marker)
        outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=np.float64)
        outline /= np.abs(outline).max()
        yield {"rule": rule, "colour": colour, "points": " ".join(f"{x:.3f},{-y:.3f}" for x, y in outline)}


def _svg(draw: Callable[[Any], None], salt: str, label: str) -> str:
    """A small plot as an element of the page; `salt` makes its ids unique there, `label` is for screen readers."""
    import matplotlib
    from markupsafe import escape
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": salt}), warnings.catch_warnings():
        # The browser draws the letters, so it does not matter which of them matplotlib's font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(4.6, 3.9), layout="constrained")
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r'id="(rule-\d+)-\w+"', r'class="\1"', svg[svg.index("<svg") :])
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{salt}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}; the table Cells has them" ', 1)


def save_fronts(file: Path, summary: dict) -> None:
    """Save the fronts of every pair of objectives, if there are any, in one picture with a legend."""
    import matplotlib
    from matplotlib.figure import Figure

    pairs = list(combinations(summary["objectives"], 2))
    if not pairs:
        return
    across = min(ACROSS, len(pairs))
    down = -(-len(pairs) // across)
    with matplotlib.rc_context(SETTINGS), atomic_file(file) as temporary:
        figure = Figure(figsize=(4.6 * across, 4.0 * down), layout="constrained")
        for i, pair in enumerate(pairs, start=1):
            _draw_front(figure.add_subplot(down, across, i), summary, pair, writable=drawable)
        _add_legend(figure, summary)
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def labels(summary: dict) -> dict[str, str]:
    """What the legend explains besides the rules: faint points and bars, where some front has them."""
    edges = [edge(summary["cells"], *pair) for pair in combinations(summary["objectives"], 2)]
    drawn = {
        "faint": any(not _is_main(cell, on_edge) for on_edge in edges for cell in summary["cells"]),
        "bars": any(values["gain"] for cell in summary["cells"] for values in cell["rewards"].values()),
    }
    return {kind: text for kind, text in LABELS.items() if drawn[kind]}


def _add_legend(figure: Any, summary: dict) -> None:
    """Below the fronts: every rule's marker, faint points and bars, in as many columns as the figure is wide."""
    from matplotlib.lines import Line2D

    marks: list[Line2D] = []
    for rule, (colour, marker) in styles(summary["rules"]).items():
        marks.append(Line2D([], [], linestyle="", color=colour, marker=marker, label=drawable(rule)))
    shapes: dict[str, Any] = {"faint": {"marker": "o", "alpha": FAINT}, "bars": {"marker": "+", "ms": 12, "mew": 0.8}}
    for kind, label in labels(summary).items():
        marks.append(Line2D([], [], linestyle="", color="black", label=label, **shapes[kind]))
    width, height = figure.get_size_inches()
    for columns in range(len(marks), 0, -1):
        legend = figure.legend(handles=marks, loc="outside lower center", ncols=columns, frameon=False)
        extent = legend.get_window_extent()
        if columns == 1 or extent.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_size_inches(width, height + extent.height / figure.dpi)


def _draw_front(axes: Any, summary: dict, pair: tuple[str, str], *, writable: Callable[[str], str] = str) -> None:
    """Mean rewards in natural units; bars are the intervals of the paired gain over the base, around the mean.

    Cells on the edge are joined, at strength 1 in full ink; those off it and those of other strengths are faint.
    """
    rewards = [summary["objectives"][name] for name in pair]
    measured = [c for c in summary["cells"] if all(c["rewards"][reward]["mean"] for reward in rewards)]
    on_edge = edge(measured, *pair)
    for i, (rule, style) in enumerate(styles(summary["rules"]).items()):
        cells = [cell for cell in measured if cell["rule"] == rule]
        mixed = any(max(cell["shares"].values()) < 1 - 1e-6 for cell in cells if cell["shares"])
        key = "strength" if mixed else "weights"  # a rule of single objectives goes along strengths
        lines: dict[object, list[dict]] = {}
        for cell in on_edge:
            if cell["rule"] == rule:
                lines.setdefault(cell[key], []).append(cell)
        for value, joined in lines.items():
            means = [[cell["rewards"][reward]["mean"]["mean"] for cell in joined] for reward in rewards]
            alpha = FAINT if key == "strength" and value != 1 else 0.9
            axes.plot(*means, "-", color=style[0], lw=1.3, alpha=alpha, gid=f"rule-{i}-line")
        for cell in cells:
            figures = [cell["rewards"][reward] for reward in rewards]
            points, gains = [reward["mean"] for reward in figures], [reward["gain"] for reward in figures]
            _draw_point(axes, points, gains, style, f"rule-{i}-point", faint=not _is_main(cell, on_edge))
    _finish(axes, *(axis_label(writable(name), writable(summary["objectives"][name])) for name in pair))


def _draw_metric(axes: Any, summary: dict, metric: Metric) -> None:
    for i, (rule, style) in enumerate(styles(summary["rules"]).items()):
        for cell in summary["cells"]:
            point = metric.figure.of(cell), WEIGHTED_GAIN.of(cell)
            if cell["rule"] == rule and None not in point:
                values = [value if isinstance(value, dict) else {"mean": value, "low": None} for value in point]
                _draw_point(axes, values, values, style, f"rule-{i}-point")
    unit = f" ({metric.unit})" if metric.unit else ""
    _finish(axes, f"{metric.title}{unit}", "weighted gain over the base (σ)")


def _draw_point(
    axes: Any, means: Sequence[dict], bars: Sequence[dict | None], style: Style, gid: str, *, faint: bool = False
) -> None:
    """One cell at two means, with the half lengths of two intervals as bars."""
    colour, marker = style
    x, y = ([mean["mean"]] for mean in means)
    x_bars, y_bars = ([[end] for end in half_lengths(bar)] if bar and bar["low"] is not None else None for bar in bars)
    drawn = axes.errorbar(
        x, y, xerr=x_bars, yerr=y_bars, fmt=marker, color=colour, ecolor=colour, elinewidth=0.8, mec="white", mew=0.6,
        ms=9 if style in FIXED.values() else 6, alpha=FAINT if faint else 1.0, zorder=3 if faint else 4,
    )  # fmt: skip
    for artist in drawn.get_children():
        artist.set_gid(gid)


def _finish(axes: Any, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.06)


def _is_main(cell: dict, on_edge: Sequence[dict]) -> bool:
    """Whether a cell is drawn in full: the base, and the edge between the two objectives at strength 1."""
    return cell["rule"] == "base" or (cell["strength"] == 1 and cell in on_edge)
