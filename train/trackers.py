"""Experiment trackers: which are installed, and how each of them takes images."""

import dataclasses
import json
from collections.abc import Sequence
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
    """Raise ValueError for a tracker, other than `all`, that is not installed; accelerate ignores it silently."""
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in (*installed, "all"):
            raise ValueError(
                f"report_to {name} needs a package that is not installed: pip install {PACKAGES.get(name, name)}, or "
                f"choose from {', '.join(sorted(installed)) or 'none'}"
            )


def start_trackers(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Start the trackers of the settings, unless they run already, with the configuration of the run."""
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


def log_images(
    trackers: Sequence[Any], step: int, images: list[Image.Image], captions: list[str], *, name: str = ""
) -> None:
    """Send images to every tracker that takes images, in one picture with the captions if it has none of its own.

    Args:
        name: tells several pictures of a step apart.
    """
    if trackers:
        tag = f"{TAG}/{name}" if name else TAG
        _log(trackers, step, tag, images, captions, captioned_grid(images, captions))


def log_picture(trackers: Sequence[Any], step: int, tag: str, picture: Image.Image) -> None:
    """Send one picture, as it is, to every tracker that takes images."""
    _log(trackers, step, tag, [picture], [None], picture)


def _log(
    trackers: Sequence[Any],
    step: int,
    tag: str,
    images: Sequence[Image.Image],
    captions: Sequence[str | None],
    together: Image.Image,
) -> None:
    """Images for trackers that take several with captions, and for others one picture of all."""
    for tracker in trackers:
        if tracker.name in ("wandb", "swanlab"):
            library = import_module(tracker.name)
            pictures = [library.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
            tracker.log({tag: pictures}, step=step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_image(tag, np.asarray(together), step, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            taken: dict[str, Any] = {"aim": (together, ""), "clearml": together}
            tracker.log_images({tag: taken.get(tracker.name, [np.asarray(together)])}, step=step)
