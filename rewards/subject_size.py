"""Size of the subject of an image on a plain background."""

from collections.abc import Sequence

import torch

from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores

BORDER = 1 / 32  # of the width of the image
BACKGROUND, SUBJECT = 0.15, 0.3  # difference in a colour channel, at most and at least


def subject_size(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return the share of the pixels that differ from the background, in percent.

    The colour of the background is the median of every channel over the border of the image. With d the largest
    difference of a pixel's channels to it, in [0, 1], the pixel counts as 0 up to d = 0.15, as 1 from d = 0.3, and
    linearly between them. Differentiable almost everywhere; prompts are not used.
    """
    images = images.float()
    width = max(1, round(images.shape[-1] * BORDER))
    border = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    border[width:-width, width:-width] = False
    background = images[:, :, border].median(2).values
    difference = (images - background[:, :, None, None]).abs().amax(1)
    return 100 * ((difference - BACKGROUND) / (SUBJECT - BACKGROUND)).clamp(0, 1).mean((1, 2))


SUBJECT_SIZE = NamedReward(function=subject_size, source="stepfuse", unit="percent")
