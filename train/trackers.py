"""Experiment trackers: which are installed, and validation images as each of them takes images."""

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from stepfuse.data.grid import CELL, captioned_grid
from stepfuse.data.images import to_image
from stepfuse.data.lettering import enlarge, enlargement
from stepfuse.data.names import nearest
from stepfuse.train.samples import beside
from stepfuse.train.settings import TRACKERS
from stepfuse.train.validation import Validation

TAG = "validation"
SHOWN = 16  # validation images that are logged
PACKAGES = {"comet_ml": "comet-ml"}  # names on PyPI, where they differ


def check_trackers(names: list[str]) -> None:
    """Check that trackers are installed; accelerate passes over missing ones silently.

    Args:
        names: Trackers as accelerate calls them, or `all`.

    Raises:
        ValueError: For one that is not installed or not known.
    """
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in (*TRACKERS, "all"):
            raise ValueError(f"report_to is {name!r}{nearest(name, TRACKERS)}")
        if name not in (*installed, "all"):
            raise ValueError(
                f"report_to {name} needs a package that is not installed: pip install {PACKAGES.get(name, name)}, or "
                f"choose from {', '.join(sorted(installed)) or 'none'}"
            )


def start_trackers(accelerator: Accelerator, names: list[str], config: dict[str, Any]) -> None:
    """Start the accelerator's trackers, on the main process.

    Args:
        names: Trackers that were asked for.
        config: Settings of the run, as numbers and strings.

    Raises:
        ValueError: If a tracker cannot start, for example without a login.
    """
    try:
        accelerator.init_trackers("stepfuse", config=config)
    except Exception as error:  # each tracker has its own exceptions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"report_to {', '.join(names)}: a tracker cannot start ({reason}); choose others or none"
        ) from error


def log_validation(accelerator: Accelerator, step: int, validation: Validation, base: Validation | None) -> None:
    """Send the first validation images to every tracker that takes images.

    Each has its reward in its caption. Next to it, on the left, is the image of the base model from the same prompt
    and noise.

    Args:
        base: Images of the base model; None before training, when the policy is the base model.
    """
    images, captions = [], []
    factor = enlargement(to_image(validation.pixels[0]), CELL)
    for i, prompt in enumerate(validation.prompts[:SHOWN]):
        image = enlarge(to_image(validation.pixels[i]), factor)
        caption = f"{prompt}\nreward {validation.rewards[i]:.4g}"
        if base is not None:
            image = beside(enlarge(to_image(base.pixels[i]), factor), image)
            caption = f"{prompt}\nbase, left: {base.rewards[i]:.4g}; right: {validation.rewards[i]:.4g}"
        images.append(image)
        captions.append(caption)
    for tracker in accelerator.trackers:
        LOGGERS.get(tracker.name, _other)(tracker, images, captions, step)


def _tensorboard(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    # it has no captions, so they are drawn into the picture
    tracker.writer.add_image(TAG, np.asarray(captioned_grid(images, captions)), step, dataformats="HWC")


def _wandb(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    import wandb

    pictures = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
    tracker.log({TAG: pictures}, step=step)


def _swanlab(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    import swanlab

    pictures = [swanlab.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
    tracker.log({TAG: pictures}, step=step)


def _aim(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    tracker.log_images({TAG: (captioned_grid(images, captions), "")}, step=step)


def _clearml(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    tracker.log_images({TAG: captioned_grid(images, captions)}, step=step)


def _other(tracker: Any, images: list[Image.Image], captions: list[str], step: int) -> None:
    """By accelerate's own `log_images`, where a tracker has it."""
    if hasattr(tracker, "log_images"):
        tracker.log_images({TAG: [np.asarray(captioned_grid(images, captions))]}, step=step)


LOGGERS: dict[str, Callable[[Any, list[Image.Image], list[str], int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
    "aim": _aim,
    "clearml": _clearml,
}
