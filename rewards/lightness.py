"""Lightness of CIE 1976 (L*)."""

from collections.abc import Sequence

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores


def lightness(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return the mean of L* = 116 f(Y) - 16 over the pixels: 0 for black, 100 for white.

    Y = 0.2126 R + 0.7152 G + 0.0722 B is the relative luminance of linear sRGB (IEC 61966-2-1), and f(Y) = Y^(1/3), or
    Y/(3 δ²) + 4/29 up to δ³ with δ = 6/29. Differentiable; prompts are not used.
    """
    images = images.float()
    linear = (images / 12.92).where(images <= 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear.unbind(1)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    delta = 6 / 29
    near_black = luminance / (3 * delta**2) + 4 / 29
    f = near_black.where(luminance <= delta**3, luminance.clamp(min=delta**3) ** (1 / 3))
    return (116 * f - 16).mean((1, 2))


LIGHTNESS = NamedReward(function=lightness, source="CIE 15", unit="L*")
