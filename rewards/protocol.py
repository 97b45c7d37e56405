"""What a reward is, and the check every score passes before anything learns from it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.rewards.user_code import line_at_fault

Pixels = Float[Tensor, "batch 3 height width"]
Scores = Float[Tensor, " batch"]


class Reward(Protocol):
    """One method: pixels in [0, 1] and their prompts → one score an image, higher is better."""

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores: ...


def score(
    reward: Reward, images: Pixels, prompts: Sequence[str], *, name: str = "reward", finite: bool = True
) -> Scores:
    """Call a reward and check what it returns; float32, on the device of the images.

    Args:
        finite: refuse numbers that are not; otherwise they are for the caller to see.

    Raises:
        ValueError: for a reward that fails, and for a result that is no tensor of one finite number an image, naming
            the reward and prompt.
    """
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images; expected as many")
    try:
        with torch.autocast(images.device.type, enabled=False):  # what a training step runs in is not the reward's
            values = reward(images, prompts)
    except Exception as error:  # rewards are anybody's code
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        line = line_at_fault(error)
        where = f" ({line})" if line else ""
        raise ValueError(f"reward {name!r} failed: {kind}{' '.join(str(error).split())}{where}") from error
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"reward {name!r} returned {shape} for {len(images)} images; expected a tensor ({len(images)},)"
        )
    bad = ~torch.isfinite(values)
    if finite and bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"reward {name!r} is {values[first].item()} for the prompt {prompts[first]!r}")
    return values.float().to(images.device)


def close(reward: Reward) -> None:
    """End what a reward holds beyond this process's memory: a worker. It can be called again, and starts another."""
    end = getattr(reward, "close", None)
    if callable(end):
        end()
