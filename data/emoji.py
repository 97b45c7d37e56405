"""The data of the embedded base: concepts, captions, background colours, and the rendering of images.

An image shows one Noto emoji on a coloured background, and its caption is, for example, "a red apple on a blue
background". For every concept, two of the twelve background colours are held out: captions with these are not used in
training, and evaluations use them as prompts.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from stepfuse.data.images import to_image

FOLDER = Path(__file__).parent / "emoji-base"
PIPELINE = FOLDER / "pipeline"
CLIP = FOLDER / "clip"
ADAPTER_SET = Path(__file__).parent / "emoji-set"
RESOLUTION = 64

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (206, 48, 52),
    "orange": (242, 146, 44),
    "yellow": (248, 220, 80),
    "green": (70, 160, 80),
    "cyan": (96, 208, 216),
    "blue": (52, 96, 200),
    "purple": (132, 72, 176),
    "pink": (248, 168, 200),
    "brown": (128, 84, 52),
    "black": (32, 32, 36),
    "gray": (144, 148, 152),
    "white": (242, 242, 240),
}


@dataclass(frozen=True, kw_only=True)
class EmojiPrompt:
    """One concept on one background. Prompts with `held_out` are not used in training."""

    concept: str
    background: str
    held_out: bool

    @property
    def caption(self) -> str:
        """The text of the prompt."""
        return f"{_article(self.concept)} {self.concept} on {_article(self.background)} {self.background} background"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" else "a"


@cache
def concepts() -> dict[str, str]:
    """Map each concept to its short name in the emoji package, in the order of `concepts.csv`."""
    with open(FOLDER / "concepts.csv", newline="", encoding="utf-8") as file:
        return {row["phrase"]: row["short_name"] for row in csv.DictReader(file)}


@cache
def prompts() -> tuple[EmojiPrompt, ...]:
    """Return the prompts of all concepts and backgrounds; 2 of the 12 backgrounds of each concept are held out."""
    return tuple(
        EmojiPrompt(concept=concept, background=background, held_out=(i + j) % 6 == 0)
        for i, concept in enumerate(concepts())
        for j, background in enumerate(BACKGROUNDS)
    )


def captions(*, held_out: bool) -> list[str]:
    """Return the captions of the training split or of the held-out split."""
    return [prompt.caption for prompt in prompts() if prompt.held_out == held_out]


def render(emoji: Image.Image, background: str, generator: torch.Generator) -> Image.Image:
    """Draw an emoji on a background, with random size, position, shade and texture.

    Args:
        emoji: RGBA image of the concept.
        background: A name in `BACKGROUNDS`.
        generator: Generator of all random numbers.

    Returns:
        RGB image of 64×64 pixels.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    canvas = _background(BACKGROUNDS[background], uniform)
    size = round(uniform(0.66, 0.94) * RESOLUTION)
    left, top = (round(uniform(0, RESOLUTION - size)) for _ in range(2))
    scaled = emoji.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    canvas.paste(scaled, (left, top), scaled)
    return canvas


def _background(colour: tuple[int, int, int], uniform: Callable[[float, float], float]) -> Image.Image:
    """Draw a plain, graded or striped background around one colour."""
    shade = uniform(-14, 14)
    angle, texture = uniform(0, 2 * math.pi), uniform(0, 1)
    axis = torch.linspace(-1, 1, RESOLUTION)
    along = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    if texture < 0.5:
        wave = torch.zeros_like(along)
    elif texture < 0.75:
        wave = uniform(12, 30) * along
    else:
        wave = uniform(8, 20) * torch.sin(uniform(8, 16) * along).mul(4).clamp(-1, 1)
    pixels = torch.tensor(colour, dtype=torch.float32)[:, None, None] + shade + wave
    return to_image(pixels.div(255).clamp(0, 1))
