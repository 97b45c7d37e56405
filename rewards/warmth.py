"""Warmth of the colours: how much more red than blue an image has."""

from collections.abc import Sequence

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores


def warmth(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return the mean of R - B over the pixels, on 0 to 255. Differentiable; prompts are not used."""
    red, _, blue = (images.float() * 255).unbind(1)
    return (red - blue).mean((1, 2))


WARMTH = NamedReward(function=warmth, source="stepfuse", unit="8-bit levels")
