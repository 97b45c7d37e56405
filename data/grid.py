"""A labelled grid of images."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from stepfuse.data.lettering import Lettering, enlarge, enlargement

Rows = Sequence[Sequence[Image.Image]]


CELL = 128  # pixels: smaller images are enlarged to at least this


def labelled_grid(
    rows: Rows, row_labels: Sequence[str], column_labels: Sequence[str], *, factor: int | None = None
) -> Image.Image:
    """Rows of images with a label beside each row and above each column.

    Labels are complete: they are wrapped, and rows and columns grow where a label needs more room than an image. An
    image is shown with each of its pixels as a square of `factor` × `factor` pixels.

    Args:
        rows: images of one size.
        row_labels: one for each row, such as its prompt.
        column_labels: one for each column; a line break starts a new line, and a line does not end at a no-break space.
        factor: by default the smallest at which an image has at least 128 pixels.
    """
    first = rows[0][0]
    factor = factor or enlargement(first, CELL)
    width, height = first.width * factor, first.height * factor
    text = Lettering(max(13, width // 20))
    gap = text.size
    heads = [
        [line for part in label.split("\n") for line in text.wrap(part, max(width, 14 * text.size))]
        for label in column_labels
    ]
    labels = _beside(row_labels, text, height)
    margin = gap + max(_width(lines, text) for lines in labels) + gap
    column = max(width, *(_width(lines, text) for lines in heads))
    top = gap // 2 + text.line_height * max(map(len, heads)) + gap // 2
    heights = [max(height, text.line_height * len(lines)) for lines in labels]
    size = margin + len(heads) * (column + gap), top + sum(heights) + len(heights) * (gap // 2)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(heads):
        for k, line in enumerate(reversed(lines)):
            left = margin + j * (column + gap) + (column - text.width(line)) / 2
            text.draw(draw, left, top - gap // 2 - (k + 0.5) * text.line_height, line)
    for row, lines, tall in zip(rows, labels, heights, strict=True):
        middle = top + tall / 2
        for k, line in enumerate(lines):
            text.draw(draw, gap, middle + (k - (len(lines) - 1) / 2) * text.line_height, line)
        for j, image in enumerate(row):
            left = margin + j * (column + gap) + (column - width) // 2
            sheet.paste(enlarge(image.convert("RGB"), factor), (left, round(middle - height / 2)))
        top += tall + gap // 2
    return sheet


def _beside(labels: Sequence[str], text: Lettering, height: int) -> list[list[str]]:
    """Lines of the rows' labels: as narrow as they can be without being taller than an image, up to a limit."""
    for letters in (11, 16, 22, 30, 40):
        lines = [text.wrap(label, letters * text.size) for label in labels]
        if max(map(len, lines)) * text.line_height <= height:
            break
    return lines


def _width(lines: Sequence[str], text: Lettering) -> int:
    return math.ceil(max(text.width(line) for line in lines))
