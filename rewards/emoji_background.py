"""Agreement of an emoji image's background colour with its prompt, measured without a network."""

import re
from collections.abc import Sequence

import torch

from stepfuse.data.devices import to_device
from stepfuse.data.emoji import BACKGROUNDS
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores

BORDER = 1 / 16  # of the width of the image


def emoji_background(images: Pixels, prompts: Sequence[str]) -> Scores:
    """r = -sqrt(mean((c - c*)²)), with c the mean colour of the border and c* the prompt's background, RGB 0 to 255.

    Prompts have the form "a red apple on a blue background"; other colours than `BACKGROUNDS` raise ValueError. No
    adapter is trained on this reward, so it shows whether another one, such as a CLIP score, is exploited. It is
    approximate: the shade of backgrounds varies, and an emoji may reach into the border.
    """
    width = max(1, round(images.shape[-1] * BORDER))
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    inside[width:-width, width:-width] = True
    colour = images.float()[:, :, ~inside].mean(2) * 255
    expected = to_device(torch.tensor([_expected_colour(p) for p in prompts]), colour.device, colour.dtype)
    return -(colour - expected).square().mean(1).sqrt()


def _expected_colour(prompt: str) -> tuple[int, int, int]:
    match = re.search(r"\bon an? (\w+) background\b", prompt)
    if match is None or match[1] not in BACKGROUNDS:
        raise ValueError(f"the prompt {prompt!r} names no background; expected one of {', '.join(BACKGROUNDS)}")
    return BACKGROUNDS[match[1]]


EMOJI_BACKGROUND = NamedReward(function=emoji_background, source="stepfuse", unit="8-bit levels")
