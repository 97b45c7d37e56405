"""The data of the bundled base models: concepts, captions and background colours. Importing this does not import torch.

An image shows one Noto emoji on a coloured background, captioned "a red apple on a blue background". For every concept,
two of the twelve background colours are held out of training; evaluations use these captions as prompts.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "emoji-base"
PIPELINE = FOLDER / "pipeline"
FLOW = Path(__file__).parent / "emoji-flow"
BASES = {"emoji-flow": FLOW, "emoji": PIPELINE}  # by the names that commands take
CLIP = FOLDER / "clip"
ADAPTER_SET = Path(__file__).parent / "emoji-set"
FLOW_ADAPTER_SET = Path(__file__).parent / "emoji-flow-set"
ADAPTER_SETS = {"emoji-flow": FLOW_ADAPTER_SET, "emoji": ADAPTER_SET}  # each has the name of its base
LICENCE = "apache-2.0"  # of the bundled base models
RESOLUTION = 64
GUIDANCE_SCALES = {"emoji-flow": 2.0}  # of bases whose images are better with guidance, also if trained without it

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
        return f"{with_article(self.concept)} on {with_article(self.background)} background"


def with_article(noun: str) -> str:
    """`an apple`, `a cat`; a noun that begins with u takes `a`, as `a unicorn`."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


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
