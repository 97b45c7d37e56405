"""Pictures for people: a labelled grid of images, and the front between two rewards."""

from collections.abc import Sequence
from pathlib import Path

Bars = dict[str, float]  # {"mean", "low", "high"}


def save_front(
    file: Path,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    base: tuple[float, float],
    *,
    intervals: Sequence[tuple[Bars, Bars] | None],
    legend: str,
    x_label: str,
    y_label: str,
) -> None:
    """Plot mean reward against mean reward: one point for each mixture with its intervals, and the base.

    Args:
        points: mean rewards of the mixtures, in the order in which a line joins them.
        labels: written beside the points.
        base: mean rewards of the base.
        intervals: for each point the 95 % intervals of its gains over the base, drawn around the mean; None where
            none was computed.
        legend: what the points are.
        x_label: of the axis, with its unit.
        y_label: likewise.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patheffects import withStroke

    figure, axes = pyplot.subplots(figsize=(6.5, 5), layout="constrained")
    axes.plot(*zip(*points, strict=True), "-o", color="tab:blue", label=legend, zorder=3)
    measured = [(point, bars) for point, bars in zip(points, intervals, strict=True) if bars]
    if measured:
        axes.errorbar(
            *zip(*(point for point, _ in measured), strict=True),
            xerr=list(zip(*(interval_lengths(x) for _, (x, _) in measured), strict=True)),
            yerr=list(zip(*(interval_lengths(y) for _, (_, y) in measured), strict=True)),
            fmt="none", ecolor="tab:blue", elinewidth=1, capsize=2.5, alpha=0.7,
            label="95 % interval of the gain over the base",
        )  # fmt: skip
    for point, label in zip(points, labels, strict=True):
        axes.annotate(
            label, point, textcoords="offset points", xytext=(7, 7), fontsize=9, zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    axes.plot(*base, "s", color="dimgray", label="base", zorder=3)
    axes.margins(0.12)
    axes.set(xlabel=x_label, ylabel=y_label, title="Mean rewards on held-out prompts")
    figure.legend(loc="outside lower center", frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def interval_lengths(interval: Bars) -> tuple[float, float]:
    """How far an interval reaches below and above its mean."""
    return interval["mean"] - interval["low"], interval["high"] - interval["mean"]
