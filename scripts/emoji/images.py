"""Emoji of the npm package, and batches of captioned images drawn from them."""

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepfuse.data import emoji
from stepfuse.data.images import to_image, to_pixels


def read_package(package: Path) -> dict[str, Image.Image]:
    """Concept phrase → RGBA picture, from the npm package."""
    with tarfile.open(package) as archive:

        def read(name: str) -> bytes:
            file = archive.extractfile(f"package/{name}")
            assert file is not None  # no folder
            return file.read()

        files = {entry["short_name"]: entry["image"] for entry in json.loads(read("emoji.json"))}
        return {
            phrase: Image.open(io.BytesIO(read(f"img/google/64/{files[name]}"))).convert("RGBA")
            for phrase, name in emoji.concepts().items()
        }


def draw_batch(
    pictures: dict[str, Image.Image], size: int, generator: torch.Generator, *, held_out: bool = False
) -> tuple[list[str], Tensor]:
    """Captions of one split and their images in [-1, 1]."""
    pool = [prompt for prompt in emoji.prompts() if prompt.held_out == held_out]
    chosen = [pool[i] for i in torch.randint(len(pool), (size,), generator=generator).tolist()]
    images = [render(pictures[p.concept], p.background, generator) for p in chosen]
    return [p.caption for p in chosen], torch.stack([to_pixels(i) for i in images]) * 2 - 1


def render(picture: Image.Image, background: str, generator: torch.Generator) -> Image.Image:
    """Draw an RGBA emoji on a background of `emoji.BACKGROUNDS`, with random size, position, shade and texture."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    canvas = _background(emoji.BACKGROUNDS[background], uniform)
    size = round(uniform(0.66, 0.94) * emoji.RESOLUTION)
    left, top = (round(uniform(0, emoji.RESOLUTION - size)) for _ in range(2))
    scaled = picture.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    canvas.paste(scaled, (left, top), scaled)
    return canvas


def _background(colour: tuple[int, int, int], uniform: Callable[[float, float], float]) -> Image.Image:
    shade = uniform(-14, 14)
    angle, kind = uniform(0, 2 * math.pi), uniform(0, 1)
    axis = torch.linspace(-1, 1, emoji.RESOLUTION)
    along = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    if kind < 0.5:
        wave = torch.zeros_like(along)
    elif kind < 0.75:
        wave = uniform(12, 30) * along
    else:
        wave = uniform(8, 20) * torch.sin(uniform(8, 16) * along).mul(4).clamp(-1, 1)
    pixels = torch.tensor(colour, dtype=torch.float32)[:, None, None] + shade + wave
    return to_image(pixels.div(255).clamp(0, 1))
