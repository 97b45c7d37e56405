"""Colourfulness (Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images")."""

from collections.abc import Sequence

import torch

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores


def colourfulness(images: Pixels, prompts: Sequence[str]) -> Scores:
    """M = sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²), with rg = R - G, yb = (R + G)/2 - B, on 0 to 255.

    In the paper's user study, 0 is "not colourful" and 109 "extremely colourful". Differentiable; prompts are not used.
    """
    red, green, blue = (images.float() * 255).unbind(1)
    opponents = torch.stack((red - green, (red + green) / 2 - blue)).flatten(2)
    variance = opponents.var(2, correction=0).sum(0)
    square_of_mean = opponents.mean(2).square().sum(0)
    return variance.clamp(min=1e-12).sqrt() + 0.3 * square_of_mean.clamp(min=1e-12).sqrt()


COLOURFULNESS = NamedReward(function=colourfulness, source="Hasler and Süsstrunk 2003", unit="8-bit levels")
