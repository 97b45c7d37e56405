"""Root mean square contrast (Peli 1990, "Contrast in complex images")."""

from collections.abc import Sequence

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores


def contrast(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return the standard deviation of the luma 0.299 R + 0.587 G + 0.114 B over the pixels, in percent of white.

    The luma is that of ITU-R BT.601. Differentiable except for flat images; prompts are not used.
    """
    red, green, blue = images.float().unbind(1)
    luma = 100 * (0.299 * red + 0.587 * green + 0.114 * blue)
    return luma.flatten(1).var(1, correction=0).clamp(min=1e-12).sqrt()


CONTRAST = NamedReward(function=contrast, source="Peli 1990", unit="percent")
