"""Whether an emoji picture has the background its prompt names: measured in colour alone, no network."""

import re
from collections.abc import Sequence

import torch

from stepfuse.data.emoji import BACKGROUNDS
from stepfuse.rewards.protocol import Pixels, Scores

BORDER = 1 / 16  # of the width


def emoji_background(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Minus the distance between the border's mean colour and the one named, as a root mean square over RGB, 0 to 255.

    For prompts of the emoji world, "a red apple on a blue background". Held out of all training, it is a check on what
    merely pleases a CLIP. A rough one: grounds vary in shade, and an emoji may reach into the border.

    Raises:
        ValueError: for a prompt that names no background of the emoji world.
    """
    width = max(1, round(images.shape[-1] * BORDER))
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    inside[width:-width, width:-width] = True
    found = images.float()[:, :, ~inside].mean(2) * 255
    return -(found - torch.tensor([_colour(p) for p in prompts]).to(found)).square().mean(1).sqrt()


def _colour(prompt: str) -> tuple[int, int, int]:
    match = re.search(r"\bon an? (\w+) background\b", prompt)
    if match is None or match[1] not in BACKGROUNDS:
        raise ValueError(f"the prompt {prompt!r} names no background; expected one of {', '.join(BACKGROUNDS)}")
    return BACKGROUNDS[match[1]]
