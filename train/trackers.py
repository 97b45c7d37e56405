"""Experiment trackers: which are installed, and how each of them takes images."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from stepfuse.data.grid import captioned_grid
from stepfuse.train.settings import TrainSettings

TAG = "validation"
PACKAGES = {"comet_ml": "comet-ml"}  # names on PyPI, where they differ


def check_trackers(names: list[str]) -> None:
    """Check that trackers are installed; accelerate ignores missing ones silently.

    Args:
        names: Trackers as accelerate calls them, or `all`.

    Raises:
        ValueError: For one that is not installed.
    """
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in (*installed, "all"):
            raise ValueError(
                f"report_to {name} needs a package that is not installed: pip install {PACKAGES.get(name, name)}, or "
                f"choose from {', '.join(sorted(installed)) or 'none'}"
            )


def start_trackers(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Start the trackers of the settings, unless they run already, with the configuration of the run.

    Raises:
        ValueError: If a tracker cannot start, for example without a login.
    """
    if accelerator.trackers or not settings.trackers:
        return
    plain = dataclasses.asdict(settings)  # tensorboard takes numbers and strings only
    config = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in plain.items()}
    try:
        accelerator.init_trackers("stepfuse", config=config)
    except Exception as error:  # each tracker has its own exceptions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"report_to {', '.join(settings.trackers)}: a tracker cannot start ({reason}); choose others or none"
        ) from error


def log_images(trackers: Sequence[Any], step: int, images: list[Image.Image], captions: list[str]) -> None:
    """Send images to every tracker that takes images."""
    for tracker in trackers:
        LOGGERS.get(tracker.name, _other)(tracker, images, captions, step)


def _tensorboard(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    # it has no captions, so they are drawn into the picture
    tracker.writer.add_image(TAG, np.asarray(captioned_grid(images, captions)), step, dataformats="HWC")


def _captioned(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    library = import_module(tracker.name)
    pictures = [library.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
    tracker.log({TAG: pictures}, step=step)


def _aim(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    tracker.log_images({TAG: (captioned_grid(images, captions), "")}, step=step)


def _clearml(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    tracker.log_images({TAG: captioned_grid(images, captions)}, step=step)


def _other(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    """By accelerate's `log_images`, if a tracker has it."""
    if hasattr(tracker, "log_images"):
        tracker.log_images({TAG: [np.asarray(captioned_grid(images, captions))]}, step=step)


LOGGERS: dict[str, Callable[[Any, list[Image.Image], list[str], int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _captioned,
    "swanlab": _captioned,
    "aim": _aim,
    "clearml": _clearml,
}
