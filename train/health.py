"""Health of a run: numbers that are not finite, and the diversity of its images."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepfuse.data.text_files import quoted
from stepfuse.rewards.protocol import Pixels
from stepfuse.train.checkpoints import Progress

logger = logging.getLogger(__name__)

SIDE = 8  # pixels of the thumbnails that diversity is measured on
ENTRIES = 200  # most entries in the record
COLLAPSED = "diversity has collapsed"
IDLE = 10  # steps from the start without a pair to train on, after which a run of DPO stops


class Health:
    """Logs what goes wrong in a run, if this is the main process, and records it in the progress.

    Args:
        skips: skip what is not finite; otherwise it is an error.
    """

    def __init__(self, progress: Progress, *, skips: bool, main: bool) -> None:
        self.progress, self.skips, self.main = progress, skips, main
        self.idle: list[int] = []  # the first steps, as long as none had a pair to train on

    def note(self, what: str, step: int, **values: Any) -> None:
        """Log and record an event."""
        if self.main:
            details = ", ".join(f"{name} {value}" for name, value in values.items())
            logger.warning("step %d: %s%s", step, what, f" ({details})" if details else "")
        if len(self.progress.health) < ENTRIES:
            self.progress.health.append({"what": what, "step": step} | values)

    def not_finite(self, what: str, step: int, prompts: Sequence[str]) -> None:
        """Record something that is not finite and is skipped; otherwise a ValueError that names step and prompts."""
        if not self.skips:
            raise ValueError(
                f"step {step}: {what} for {quoted(sorted(prompts))}; training stopped, checkpoints are kept. "
                "--nonfinite skip skips them"
            )
        self.note(f"skipped: {what}", step, prompts=sorted(set(prompts)))

    def check_pairs(self, kept: float, step: int, margin: float) -> None:
        """Warn of a first step of DPO that trained nothing, and stop a run that began with `IDLE` such steps.

        Args:
            kept: share of the pairs whose rewards differ by more than the margin.

        Raises:
            ValueError: at step `IDLE`, if no step before had such a pair.
        """
        if kept or step != len(self.idle) + 1:
            return
        self.idle.append(step)
        said = f"no two candidates have rewards that differ by more than margin {margin:g}, so nothing was trained"
        if step == 1:
            self.note(f"{said}; a smaller --margin keeps more pairs, and 0 all that differ", step)
        elif step == IDLE:
            raise ValueError(f"in the first {IDLE} steps {said}; pass a smaller --margin, such as 0")

    def measure_diversity(self, value: float, step: int, floor: float) -> None:
        """Compare the diversity of a rollout with that of the first one, which is the base's."""
        base = self.progress.base_diversity
        if base is None:
            self.progress.base_diversity = value
        elif value < floor * base and not any(entry["what"] == COLLAPSED for entry in self.progress.health):
            self.note(COLLAPSED, step, diversity=value, base=base)


def thumbnails(pixels: Pixels) -> Float[Tensor, "batch 3 8 8"]:
    return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), SIDE)


def diversity(images: Float[Tensor, "all 3 8 8"], groups: Int[Tensor, " all"]) -> float:
    """The standard deviation of a pixel among the images of a group, over pixels and groups.

        D = sqrt( mean over groups and pixels of  Σ_i (x_i - mean)² / n )

    Twice its square is the mean squared distance of two images of a group, each pair counted both ways and each image
    with itself. The images are thumbnails, so that noise in single pixels has no effect.
    """
    flat = images.flatten(1).double()
    variances = [flat[groups == group].var(0, correction=0) for group in groups.unique()]
    return torch.stack(variances).mean().sqrt().item()
