"""The fronts of every two objectives as one picture: every mixture is labelled with its weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from stepfuse.data.intervals import half_lengths
from stepfuse.data.lettering import drawable
from stepfuse.data.output_file import atomic_file
from stepfuse.data.palette import BAR_STROKE, LIGHT, SMALL, Series, plot_settings, series
from stepfuse.fuse.rules.weights import shown_weights
from stepfuse.scripts.evaluation.plots import LABELS, add_better_arrow, add_legend_below, axis_label

DISTANCES = (1.2, 2.2, 3.4)  # of a label from its point, in font sizes: the nearest that meets nothing is taken
BAR_MARGIN = 5  # pixels around a bar in which no label should be
DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What was measured at one mixture of objectives.

    Attributes:
        weights: by objective.
        means: mean reward by objective.
        gains: gain over the base by objective, with its mean and the ends `low` and `high` of its 95 % interval; an
            objective without one has no bar.
    """

    weights: Mapping[str, float]
    means: Mapping[str, float]
    gains: Mapping[str, Mapping[str, float] | None]


def draw_mixture_front(
    file: Path, rewards: Mapping[str, str], base: Mapping[str, float], mixtures: Sequence[Mixture], *, title: str
) -> None:
    """Save the front of every two objectives: mean rewards of mixtures with the intervals of their gains, and the base.

    More than two objectives have a panel for each two, with the mixtures that have weight on one of them alone or on
    both. A line joins those without weight on others; the others are hollow.

    Args:
        rewards: the name of the reward of each objective, which gives the axis its unit: of two objectives first the
            horizontal one, then the vertical one.
        base: mean reward of the base by objective.
        mixtures: in any order.
        title: what is shown, such as "Mean rewards on 48 held-out prompts".
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    pairs = list(combinations(rewards, 2))
    (look,) = series(1)
    with matplotlib.rc_context(plot_settings()), atomic_file(file) as temporary:
        figure = Figure(figsize=(6.4 if len(pairs) == 1 else 5.2 * len(pairs), 5.0), layout="constrained")
        panels = [figure.add_subplot(1, len(pairs), i) for i in range(1, len(pairs) + 1)]
        (panels[0].set_title if len(pairs) == 1 else figure.suptitle)(drawable(title))
        for axes, pair in zip(panels, pairs, strict=True):
            marks = _draw_pair(axes, {name: rewards[name] for name in pair}, base, *_of_pair(mixtures, pair), look)
        cross: dict[str, Any] = {"marker": "+", "ms": 12, "mew": BAR_STROKE, "mec": look.colour, "ls": ""}
        add_legend_below(figure, [*marks, Line2D([], [], label=LABELS["bars"], **cross)])
        for axes, pair in zip(panels, pairs, strict=True):
            shown = [*chain(*_of_pair(mixtures, pair))]
            labels = [drawable(shown_weights(one.weights, separator="\n")) for one in shown]
            _label_points(axes, _points(shown, pair), labels)
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def _of_pair(mixtures: Sequence[Mixture], pair: Sequence[str]) -> tuple[list[Mixture], list[Mixture]]:
    """Mixtures of two objectives alone, from the first to the second, and those of both with others."""
    between = [one for one in mixtures if not {name for name, weight in one.weights.items() if weight} - set(pair)]
    within = [one for one in mixtures if one not in between and all(one.weights.get(name) for name in pair)]
    return sorted(between, key=lambda one: one.weights.get(pair[1], 0.0)), within


def _points(mixtures: Sequence[Mixture], pair: Iterable[str]) -> np.ndarray:
    return np.array([[one.means[name] for name in pair] for one in mixtures]).reshape(-1, 2)


def _draw_pair(
    axes: Any,
    rewards: Mapping[str, str],
    base: Mapping[str, float],
    between: Sequence[Mixture],
    within: Sequence[Mixture],
    look: Series,
) -> list[Any]:
    """Draw one panel; return what the legend shows of it."""
    marks: list[Any] = []
    hollow: dict[str, Any] = {"ls": "", "mfc": LIGHT.paper, "mec": look.colour, "mew": 1.2}
    for several, more in ((between, {"ls": look.dashes}), (within, hollow)):
        points = _points(several, rewards)
        label = "fused, at the weights beside it"
        for one, point in zip(several, points, strict=True):
            bars = [one.gains.get(name) for name in rewards]
            x_bar, y_bar = ([[end] for end in half_lengths(dict(bar))] if bar else None for bar in bars)
            x, y = point
            axes.errorbar(x, y, xerr=x_bar, yerr=y_bar, fmt="none", ecolor=look.colour, elinewidth=BAR_STROKE)
        marks += axes.plot(*points.T, color=look.colour, marker=look.marker, label=label, **more)
    marks += axes.plot(*(base[name] for name in rewards), color=LIGHT.ink, marker="h", ms=9, ls="", label="base")
    axes.margins(0.2, 0.14)
    labels = (axis_label(drawable(name), drawable(reward)) for name, reward in rewards.items())
    axes.set(**dict(zip(("xlabel", "ylabel"), labels, strict=True)))
    add_better_arrow(axes)
    return [marks[0], marks[-1]]


def _label_points(axes: Any, points: np.ndarray, labels: Sequence[str]) -> None:
    """A label beside each point, in the first position that meets no line, bar, other label or end of the axes."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # which lays the axes out
    pixels = axes.transData.transform(points)
    shares = np.linspace(0, 1, 25)[:, None]
    joints = [xy for first, second in pairwise(pixels) for xy in first + shares * (second - first)]
    taken = [Bbox.from_extents(*(xy - 5), *(xy + 5)) for xy in [*joints, *pixels]]
    for bar in axes.collections:  # whose own extents in the window are not those of their lines
        ends = axes.transData.transform(np.concatenate(bar.get_segments()))
        taken.append(Bbox([ends.min(0), ends.max(0)]).padded(BAR_MARGIN))
    taken += [line.get_window_extent() for line in axes.lines[1:] if line.get_xdata().size]
    taken += [text.get_window_extent() for text in axes.texts]
    room = axes.get_window_extent()
    for point, label in zip(points, labels, strict=True):
        text = axes.annotate(label, point, textcoords="offset points", xytext=(0, 0), fontsize=SMALL, linespacing=1.15)
        best, overlap = (0.0, 0.0), float("inf")
        for distance, (right, up) in product(DISTANCES, DIRECTIONS):
            text.set(ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up])
            text.xyann = (0.6 * SMALL * distance * right, 0.6 * SMALL * distance * up)
            box = text.get_window_extent()
            outside = box.width * box.height - _common(box, room)
            meets = 3 * outside + sum(_common(box, other) for other in taken)
            if meets < overlap - 1:
                best, overlap, chosen = text.xyann, meets, (text.get_ha(), text.get_va())
        text.xyann = best
        text.set(ha=chosen[0], va=chosen[1])
        taken.append(text.get_window_extent())


def _common(box: Any, other: Any) -> float:
    """The area that two boxes share."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    return max(0.0, width) * max(0.0, min(box.y1, other.y1) - max(box.y0, other.y0))
