"""The KL divergence of a policy to its base by denoising step, in words and as a picture."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from PIL import Image

from stepfuse.data.lettering import drawable
from stepfuse.data.palette import plot_settings

KL_PICTURE = "kl_steps.png"
LABELS = 12  # steps that are labelled at the most


class StepKL(TypedDict):
    """One denoising step: its noise levels before and after, and its KL in nats an image, None if not trained on."""

    sigma_t: float
    sigma_s: float
    nats: float | None


def largest_step(nats: Sequence[float | None]) -> tuple[int, float] | None:
    """The index of the denoising step with the largest KL, and its share of the sum; None where there is no KL."""
    known = [value or 0.0 for value in nats]
    if not sum(known) > 0:
        return None
    largest = max(range(len(known)), key=known.__getitem__)
    return largest, known[largest] / sum(known)


def draw_kl_steps(policies: Mapping[str, Sequence[StepKL]]) -> Image.Image:
    """The KL of each denoising step, one line for each policy by its name."""
    import matplotlib
    from matplotlib.figure import Figure

    levels = [[step["sigma_t"] for step in steps] for steps in policies.values()]
    alike = all(own == levels[0] for own in levels)
    longest = max(map(len, levels))
    shown = range(0, longest, math.ceil(longest / LABELS))
    labels = [f"{k + 1}\n{levels[0][k]:.2g}" if alike else str(k + 1) for k in shown]
    file = io.BytesIO()
    with matplotlib.rc_context(plot_settings()):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=120)
        axes = figure.subplots()
        for name, steps in policies.items():
            nats = [math.nan if step["nats"] is None else step["nats"] for step in steps]
            axes.plot(range(len(nats)), nats, label=drawable(name))
        axes.set_xticks(list(shown), labels)
        axes.set_xlim(-0.5, longest - 0.5)
        axes.set_xlabel("denoising step, the noisiest first" + ("; below, its noise level σ" if alike else ""))
        axes.set_ylabel("KL to the base (nats per image)")
        axes.set_ylim(bottom=0)
        axes.set_title("Where the policy departs from the base")
        axes.legend()
        figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
