"""Symmetry about the vertical axis of the image."""

from collections.abc import Sequence

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores


def symmetry(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return minus the mean absolute difference between an image and its mirror image, in percent: at most 0.

    Differentiable almost everywhere; prompts are not used.
    """
    images = images.float()
    return -100 * (images - images.flip(3)).abs().mean((1, 2, 3))


SYMMETRY = NamedReward(function=symmetry, source="stepfuse", unit="percent")
