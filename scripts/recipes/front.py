"""The front of the demo: mean reward against mean reward, from one adapter to the other."""

from pathlib import Path

import numpy as np

from stepfuse.data.intervals import half_lengths
from stepfuse.scripts.evaluation.plots import axis_label


def mixture_name(weight: float, first: str, second: str) -> str:
    """The name in `results.json` of the mixture with this weight of the second objective."""
    named = {0.0: f"{first} alone", 0.5: "middle", 1.0: f"{second} alone"}
    return named.get(weight, f"{first} {1 - weight:g}, {second} {weight:g}")


def draw_front(file: Path, results: dict) -> None:
    """Plot the mean rewards of the mixtures in `results.json` with the 95 % intervals of their gains over the base.

    Every mixture is a point, labelled with the weight of the second objective; a mixture without a gain has no bars.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    names = results["objectives"]
    rewards = results.get("rewards", results["objectives"])
    base, means = results["means"]["base"], {w: m for w, m in results["means"].items() if w != "base"}
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    points = np.array([[mean[name] for name in names] for mean in means.values()])
    legend = f"fused, with the weight of {names[1]}; the rest is {names[0]}"
    axes.plot(*points.T, "-o", color="tab:blue", label=legend, zorder=3)
    gains = [results["gain_over_base"].get(mixture_name(float(weight), *names)) for weight in means]
    if known := [i for i, gain in enumerate(gains) if gain]:
        x_bars, y_bars = (np.transpose([half_lengths(gains[i][name]) for i in known]) for name in names)
        axes.errorbar(
            *points[known].T, xerr=x_bars, yerr=y_bars, fmt="none", ecolor="tab:blue", elinewidth=1, capsize=2.5,
            alpha=0.7, label="95 % interval of the gain over the base",
        )  # fmt: skip
    for weight, point in zip(means, points, strict=True):
        axes.annotate(
            f"{float(weight):g}", point, textcoords="offset points", xytext=(7, 7), fontsize=9, zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    axes.plot(*(base[name] for name in names), "s", color="dimgray", label="base", zorder=3)
    axes.margins(0.12)
    labels = [axis_label(name, reward) for name, reward in zip(names, rewards, strict=True)]
    axes.set(xlabel=labels[0], ylabel=labels[1], title="Mean rewards on held-out prompts")
    figure.legend(loc="outside lower center", frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130, metadata={"Software": None})
