"""JPEG compressibility and incompressibility (Black et al. 2023, DDPO, arXiv:2305.13301, section 5.1)."""

import io
from collections.abc import Sequence
from dataclasses import replace

import torch

from stepfuse.data.images import to_image
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.protocol import Pixels, Scores

QUALITY = 95  # as in DDPO


def incompressibility(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return the size as a JPEG file of quality 95, in kB of 1000 bytes. Not differentiable; prompts are not used."""
    sizes = []
    for pixels in images:
        buffer = io.BytesIO()
        to_image(pixels).save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def compressibility(images: Pixels, prompts: Sequence[str]) -> Scores:
    """Return minus the size as a JPEG file; see `incompressibility`."""
    return -incompressibility(images, prompts)


INCOMPRESSIBILITY = NamedReward(function=incompressibility, source="arXiv:2305.13301", differentiable=False, unit="kB")
COMPRESSIBILITY = replace(INCOMPRESSIBILITY, function=compressibility)
