"""Colours, type and strokes of every picture: plots, grids of images, the report and the page of the server.

The colours of series are those of Okabe and Ito (2008), "Color Universal Design",
https://jfly.uni-koeln.de/color/, and for the fifth and sixth of Tol (2021), "Colour schemes", the scheme "muted",
https://personal.sron.nl/~pault/. Of both, the ones were taken that stand out from the background, and of those the
six that differ most from each other to people with each form of colour blindness; `tests/test_palette.py` measures
both. Every series also has its own marker and dashes, so no plot is told by colour alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import cycle, islice
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours by what they are for, as #rrggbb.

    Attributes:
        paper: background of pages and pictures.
        card: background of fields and boxes.
        band: background of headings of tables, code and what is hovered over.
        notice: background of a notice.
        ink: text and marks.
        soft: secondary text, ticks and axes.
        edge: outline of what can be clicked or typed into.
        line: grids of plots, and lines between rows.
        accent: links, the chosen point, the main button.
        accent_ink: text on `accent`.
        wrong: errors.
        series: of plots, in order.
    """

    paper: str
    card: str
    band: str
    notice: str
    ink: str
    soft: str
    edge: str
    line: str
    accent: str
    accent_ink: str
    wrong: str
    series: tuple[str, ...]

    def named(self) -> dict[str, str]:
        """Colours by the name of their CSS variable, such as `accent-ink` and `series-0`."""
        plain = {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self) if f.name != "series"}
        return plain | {f"series-{i}": colour for i, colour in enumerate(self.series)}


LIGHT = Theme(
    paper="#ffffff", card="#ffffff", band="#f1f3f5", notice="#fff4d6", ink="#1b1f24", soft="#5b6570", edge="#828a92",
    line="#d9dee3", accent="#0067a3", accent_ink="#ffffff", wrong="#b3261e",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#332288", "#882255"),
)  # fmt: skip
DARK = Theme(
    paper="#14171a", card="#1b1e22", band="#24282d", notice="#3a3117", ink="#e6e9ec", soft="#a0a9b2", edge="#747d87",
    line="#343b42", accent="#56b4e9", accent_ink="#10202b", wrong="#ff9c92",
    series=("#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#aa4499"),
)  # fmt: skip

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES: tuple[tuple[float, tuple[float, ...]], ...] = ((0, ()), (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.6, 1.4, 1.6)))
FONT_SIZE, SMALL, TITLE = 9.0, 8.0, 10.0  # points
MARGIN = 0.1  # inches around a plot
STROKE, BAR_STROKE, GRID_STROKE = 1.4, 0.9, 0.6  # points: lines of series, intervals, grids


@dataclass(frozen=True, kw_only=True)
class Series:
    """How a series is drawn in plots: `dashes` are matplotlib's offset and lengths."""

    colour: str
    marker: str
    dashes: tuple[float, tuple[float, ...]] = DASHES[0]


def series(count: int) -> list[Series]:
    """The first series of a plot; no two of the first sixty are alike."""
    drawn = zip(cycle(LIGHT.series), cycle(MARKERS), cycle(DASHES), strict=False)
    return [Series(colour=colour, marker=marker, dashes=dashes) for colour, marker, dashes in islice(drawn, count)]


def plot_settings() -> dict[str, Any]:
    """matplotlib's settings of every plot, for `matplotlib.rc_context`; lines get their series' look in order."""
    from cycler import cycler

    looks = series(len(LIGHT.series))
    order = cycler(color=[look.colour for look in looks], marker=[look.marker for look in looks])
    soft = ("axes.edgecolor", "xtick.color", "ytick.color")
    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    paper = ("figure.facecolor", "savefig.facecolor", "axes.facecolor")
    return {
        "axes.prop_cycle": order + cycler(linestyle=[look.dashes for look in looks]),
        **dict.fromkeys(soft, LIGHT.soft), **dict.fromkeys(ink, LIGHT.ink), **dict.fromkeys(paper, LIGHT.paper),
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "sans-serif"], "font.size": FONT_SIZE,
        "axes.titlesize": TITLE, "axes.labelsize": FONT_SIZE, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.linewidth": 0.8,
        "axes.grid": True, "grid.color": LIGHT.line, "grid.linewidth": GRID_STROKE, "grid.alpha": 1.0,
        "lines.linewidth": STROKE, "lines.markersize": 5.0, "lines.markeredgewidth": 0.6,
        "lines.markeredgecolor": LIGHT.paper,
        **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), MARGIN),
        "legend.frameon": False, "text.parse_math": False, "svg.fonttype": "none",
    }  # fmt: skip


def css_variables(theme: Theme) -> str:
    """The colours as declarations of CSS variables, such as `--paper: #ffffff;`."""
    return " ".join(f"--{name}: {colour};" for name, colour in theme.named().items())


def with_css_variables(svg: str, theme: Theme = LIGHT) -> str:
    """An SVG drawn in the colours of `theme`, in those of the page that it is part of."""
    names: Mapping[str, str] = {colour: name for name, colour in reversed(theme.named().items())}
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], svg)
