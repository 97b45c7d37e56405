"""Text and images in composed pictures: fonts, line breaks, and enlargement with crisp edges."""

import math
import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from stepfuse.data.palette import LIGHT

GLUE = "\u00a0"  # a no-break space: a line never ends at one
SPACES = re.compile(r"(?:(?!\u00a0)\s)+")
SOFT = "_-./:,;"  # where a word that is longer than the line is broken first
INVISIBLE = ("Cf", "Mn", "Cc")  # categories of joiners, variation selectors and control characters


class Lettering:
    """Text of one size in pixels, in DejaVu Sans; characters it lacks are drawn with an installed font that has them.

    A character that no font has is replaced by `drawable`, so that nothing is drawn as an empty box.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.line_height = round(1.3 * size)

    def width(self, text: str) -> float:
        """Width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def wrap(self, text: str, width: float) -> list[str]:
        """Break a text into lines that are at most `width` pixels wide.

        Lines end at white space, or inside a word that is wider than a line, and never at a no-break space. The text
        is complete: without white space, the joined lines are the text. A line is wider than `width` only where even
        one character, with what a no-break space joins to it, is.
        """
        lines: list[str] = []
        for word in SPACES.split(drawable(text).strip()):
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                continue
            while self.width(word) > width and (end := self._break(word, width)):
                lines.append(word[:end])
                word = word[end:]
            lines.append(word)
        return lines

    def draw(self, draw: ImageDraw.ImageDraw, left: float, top: float, *lines: str) -> None:
        """Draw lines below each other."""
        for number, line in enumerate(lines):
            x, middle = left, top + (number + 0.5) * self.line_height
            for font, run in self._runs(line):
                draw.text((x, middle), run, fill=LIGHT.ink, font=font, anchor="lm")
                x += font.getlength(run)

    def _break(self, word: str, width: float) -> int:
        """How many characters of a word fit on a line; 0 where it cannot be broken."""
        last = len(word.partition(GLUE)[0]) - 1
        fitting = 1
        while fitting < last and self.width(word[: fitting + 1]) <= width:
            fitting += 1
        soft = max(word.rfind(mark, 0, fitting) + 1 for mark in SOFT)
        if soft > fitting // 2:
            fitting = soft
        while fitting > 1 and unicodedata.combining(word[fitting]):
            fitting -= 1
        return min(fitting, max(last, 0))

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """The text in pieces of one font each."""
        runs: list[tuple[Path, str]] = []
        for character in text:
            file = _font_file(character) or _dejavu()
            if runs and (runs[-1][0] == file or unicodedata.combining(character)):
                runs[-1] = (runs[-1][0], runs[-1][1] + character)
            else:
                runs.append((file, character))
        return [(_font(file, self.size), run) for file, run in runs]


def drawable(text: str) -> str:
    """The text with what no font can draw replaced: a symbol by its name in brackets, a letter by its escape.

    `a 🦊` becomes `a [fox face]` on a machine without a font for it, and `中` becomes `\\u4e2d`.
    """
    return "".join(c if c.isspace() or _font_file(c) else _replacement(c) for c in text)


def enlargement(image: Image.Image, least: int) -> int:
    """The smallest whole factor at which the longer side of an image has `least` pixels."""
    return max(1, math.ceil(least / max(image.size)))


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """Every pixel as a square of `factor` × `factor` pixels: nothing is smoothed."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _replacement(character: str) -> str:
    category = unicodedata.category(character)
    if category in INVISIBLE and category != "Cc":
        return ""
    name = unicodedata.name(character, "")
    if category.startswith("S") and name:
        return f"[{name.lower()}]"
    return character.encode("unicode_escape").decode("ascii")


@lru_cache(maxsize=8192)
def _font_file(character: str) -> Path | None:
    """A font that has a character: DejaVu Sans, or for what it lacks and can be seen, an installed one."""
    if ord(character) in _characters(_dejavu()):
        return _dejavu()
    if unicodedata.category(character) in INVISIBLE:
        return None
    return next((file for file in _installed() if ord(character) in _characters(file)), None)


@cache
def _characters(file: Path) -> frozenset[int]:
    """Code points of the characters that a font has; none if it cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        _font(file, 16)  # bitmap fonts of other sizes cannot be used
        return frozenset(FT2Font(str(file)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size)


@cache
def _dejavu() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@cache
def _installed() -> tuple[Path, ...]:
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(map(Path, findSystemFonts())))
