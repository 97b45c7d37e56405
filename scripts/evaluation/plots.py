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
from stepfuse.data.palette import BAR_STROKE, LIGHT, SMALL, Series, plot_settings, series, with_css_variables
from stepfuse.rewards.registry import reward_unit
from stepfuse.scripts.evaluation.metric import Metric
from stepfuse.scripts.evaluation.metrics import METRICS
from stepfuse.scripts.evaluation.tables import WEIGHTED_GAIN

FIXED = {"base": Series(colour=LIGHT.ink, marker="h"), "oracle": Series(colour=LIGHT.ink, marker="*")}
LABELS = {
    "hollow": "hollow: another strength, or weight on a further objective",
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


def styles(rules: Collection[str]) -> dict[str, Series]:
    """Rule → colour, marker and dashes; base and oracle have the colour of the text."""
    others = [rule for rule in rules if rule not in FIXED]
    drawn = dict(zip(others, series(len(others)), strict=True))
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

    for rule, look in styles(summary["rules"]).items():
        style = MarkerStyle(look.marker)
        outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0], dtype=np.float64)
        outline /= np.abs(outline).max()
        points = " ".join(f"{x:.3f},{-y:.3f}" for x, y in outline)
        yield {"rule": rule, "colour": with_css_variables(look.colour), "points": points}


def _svg(draw: Callable[[Any], None], salt: str, label: str) -> str:
    """A small plot as an element of the page; `salt` makes its ids unique there, `label` is for screen readers."""
    import matplotlib
    from markupsafe import escape
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(plot_settings() | {"svg.hashsalt": salt}), warnings.catch_warnings():
        # The browser draws the letters, so it does not matter which of them matplotlib's font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(4.6, 3.9), layout="constrained")
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r'id="(rule-\d+)-\w+"', r'class="\1"', svg[svg.index("<svg") :])
    svg = re.sub(r'\bid="', f'id="{salt}-', with_css_variables(svg))
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
    with matplotlib.rc_context(plot_settings()), atomic_file(file) as temporary:
        figure = Figure(figsize=(4.6 * across, 4.0 * down), layout="constrained")
        for i, pair in enumerate(pairs, start=1):
            _draw_front(figure.add_subplot(down, across, i), summary, pair, writable=drawable)
        _add_legend(figure, summary)
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def labels(summary: dict) -> dict[str, str]:
    """What the legend explains besides the rules: hollow points and bars, where some front has them."""
    edges = [edge(summary["cells"], *pair) for pair in combinations(summary["objectives"], 2)]
    drawn = {
        "hollow": any(not _is_main(cell, on_edge) for on_edge in edges for cell in summary["cells"]),
        "bars": any(values["gain"] for cell in summary["cells"] for values in cell["rewards"].values()),
    }
    return {kind: text for kind, text in LABELS.items() if drawn[kind]}


def _add_legend(figure: Any, summary: dict) -> None:
    """Below the fronts: every rule's marker and line, hollow points and bars, in as many columns as fit."""
    from matplotlib.lines import Line2D

    marks: list[Line2D] = []
    for rule, look in styles(summary["rules"]).items():
        marker: dict[str, Any] = {"marker": look.marker, "ms": 8 if rule in FIXED else 6}
        dashes = "" if rule == "base" else look.dashes
        marks.append(Line2D([], [], linestyle=dashes, color=look.colour, label=drawable(rule), **marker))
    shapes: dict[str, dict[str, Any]] = {
        "hollow": {"marker": "o", "mfc": LIGHT.paper, "mec": LIGHT.ink, "mew": 1.0},
        "bars": {"marker": "+", "ms": 12, "mew": BAR_STROKE, "mec": LIGHT.ink},
    }
    for kind, label in labels(summary).items():
        marks.append(Line2D([], [], linestyle="", color=LIGHT.ink, label=label, **shapes[kind]))
    add_legend_below(figure, marks)


def add_legend_below(figure: Any, handles: Sequence[Any]) -> None:
    """A legend below the plots in as many columns as the figure is wide; the figure becomes higher by it."""
    width, height = figure.get_size_inches()
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)
        extent = legend.get_window_extent()
        if columns == 1 or extent.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_size_inches(width, height + extent.height / figure.dpi)


def _draw_front(axes: Any, summary: dict, pair: tuple[str, str], *, writable: Callable[[str], str] = str) -> None:
    """Mean rewards in natural units; bars are the intervals of the paired gain over the base, around the mean.

    Cells on the edge are joined; those off it and those of other strengths are hollow, and the lines of other
    strengths thin.
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
            width = {"linewidth": 0.6} if key == "strength" and value != 1 else {}
            line = {"color": style.colour, "linestyle": style.dashes, "marker": ""} | width
            axes.plot(*means, **line, gid=f"rule-{i}-line")
        for cell in cells:
            figures = [cell["rewards"][reward] for reward in rewards]
            points, gains = [reward["mean"] for reward in figures], [reward["gain"] for reward in figures]
            _draw_point(axes, points, gains, style, f"rule-{i}-point", hollow=not _is_main(cell, on_edge))
    x_label, y_label = (axis_label(writable(name), writable(summary["objectives"][name])) for name in pair)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.margins(0.06)
    add_better_arrow(axes)


def add_better_arrow(axes: Any) -> None:
    """In the upper right corner, the direction in which both rewards grow."""
    arrow = {"arrowstyle": "-|>", "color": LIGHT.soft, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "better", xy=(0.985, 0.985), xytext=(-22, -16), xycoords="axes fraction", textcoords="offset points",
        ha="right", va="top", color=LIGHT.soft, fontsize=SMALL, arrowprops=arrow | {"relpos": (1, 1)}, zorder=1,
    )  # fmt: skip


def _draw_metric(axes: Any, summary: dict, metric: Metric) -> None:
    for i, (rule, style) in enumerate(styles(summary["rules"]).items()):
        for cell in summary["cells"]:
            point = metric.figure.of(cell), WEIGHTED_GAIN.of(cell)
            if cell["rule"] == rule and None not in point:
                values = [value if isinstance(value, dict) else {"mean": value, "low": None} for value in point]
                _draw_point(axes, values, values, style, f"rule-{i}-point")
    unit = f" ({metric.unit})" if metric.unit else ""
    axes.set(xlabel=f"{metric.title}{unit}", ylabel="weighted gain over the base (σ)")
    axes.margins(0.06)


def _draw_point(
    axes: Any, means: Sequence[dict], bars: Sequence[dict | None], style: Series, gid: str, *, hollow: bool = False
) -> None:
    """One cell at two means, with the half lengths of two intervals as bars."""
    x, y = ([mean["mean"]] for mean in means)
    x_bars, y_bars = ([[end] for end in half_lengths(bar)] if bar and bar["low"] is not None else None for bar in bars)
    size = 9 if style in FIXED.values() else 6
    filled = {"mfc": LIGHT.paper, "mec": style.colour, "mew": 0.9, "ms": 0.7 * size} if hollow else {"ms": size}
    drawn = axes.errorbar(
        x, y, xerr=x_bars, yerr=y_bars, fmt="", linestyle="", marker=style.marker, color=style.colour,
        elinewidth=0.5 * BAR_STROKE if hollow else BAR_STROKE, zorder=3 if hollow else 4, **filled,
    )  # fmt: skip
    for artist in drawn.get_children():
        artist.set_gid(gid)


def _is_main(cell: dict, on_edge: Sequence[dict]) -> bool:
    """Whether a cell is drawn in full: the base, and the edge between the two objectives at strength 1."""
    return cell["rule"] == "base" or (cell["strength"] == 1 and cell in on_edge)
