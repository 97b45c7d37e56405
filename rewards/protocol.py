"""The protocol that rewards implement, and the validation of their scores."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.out_of_memory import is_out_of_memory
from stepfuse.rewards.user_code import user_line

Pixels = Float[Tensor, "batch 3 height width"]
Scores = Float[Tensor, " batch"]


class Reward(Protocol):
    """A function of images and prompts that returns one score per image. Higher is better.

    A reward that holds other resources than memory, such as a worker process, also has a method `close()`, after which
    it can be called again.
    """

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores: ...


def score(
    reward: Reward, images: Pixels, prompts: Sequence[str], *, name: str = "reward", finite: bool = True
) -> Scores:
    """Call a reward and validate the scores it returns.

    Autocast is disabled during the call, so scores do not depend on the precision of the surrounding code.

    Args:
        images: Pixels in [0, 1], of shape (batch, 3, height, width).
        prompts: One prompt per image.
        name: Name of the reward in error messages.
        finite: Whether scores that are NaN or infinite raise an error, which names the prompt.

    Returns:
        Scores of shape (batch,), float32, on the device of the images.

    Raises:
        ValueError: If the reward raises an exception, or returns anything but a tensor of shape (batch,). Errors of a
            failed allocation pass as they are, since what helps depends on the program.
    """
    if len(prompts) != len(images):
        raise ValueError(f"got {len(prompts)} prompts for {len(images)} images; expected one prompt per image")
    try:
        with torch.autocast(images.device.type, enabled=False):
            values = reward(images, prompts)
    except Exception as error:  # user code can raise any exception
        if is_out_of_memory(error):
            raise
        error_type = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        line = user_line(error)
        location = f" ({line})" if line else ""
        raise ValueError(f"reward {name!r} failed: {error_type}{' '.join(str(error).split())}{location}") from error
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        returned = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"reward {name!r} returned {returned} for {len(images)} images; expected a tensor of shape ({len(images)},)"
        )
    invalid = ~torch.isfinite(values)
    if finite and bool(invalid.any()):
        first = int(invalid.nonzero()[0])
        raise ValueError(
            f"reward {name!r} returned {values[first].item()} for the prompt {prompts[first]!r}; "
            "expected a finite number"
        )
    return values.float().to(images.device)


def close(reward: Reward) -> None:
    """Call the `close` method of a reward, if it has one."""
    method = getattr(reward, "close", None)
    if callable(method):
        method()
