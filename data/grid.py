"""Grids of images with labels: beside rows and above columns, or below each image. Labels are complete, in lines."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from stepfuse.data.lettering import Lettering, enlarge, enlargement
from stepfuse.data.palette import LIGHT

CELL = 128  # pixels: smaller images are enlarged to at least this
ImageRows = Sequence[Sequence[Image.Image]]


def labelled_grid(
    rows: ImageRows, row_labels: Sequence[str], column_labels: Sequence[str], *, factor: int | None = None
) -> Image.Image:
    """Rows of images with a label beside each row and above each column, which grow where a label needs more room.

    Args:
        rows: images of one size.
        row_labels: one for each row, such as its prompt.
        column_labels: one for each column; a line break starts a new line, and a line does not end at a no-break space.
        factor: side of the square that each pixel becomes; by default the smallest at which an image has at least 128
            pixels.
    """
    first = rows[0][0]
    factor = factor or enlargement(first, CELL)
    width, height = first.width * factor, first.height * factor
    text = Lettering(max(13, width // 20))
    gap = text.size
    heads = [_lines(label, text, max(width, 14 * text.size)) for label in column_labels]
    labels = _beside(row_labels, text, height)
    margin = gap + max(_width(lines, text) for lines in labels) + gap
    column = max(width, *(_width(lines, text) for lines in heads))
    top = gap + text.line_height * max(map(len, heads)) + gap // 2
    heights = [max(height, text.line_height * len(lines)) for lines in labels]
    size = margin + len(heads) * (column + gap), top + sum(heights) + len(heights) * (gap // 2) + gap // 2
    sheet = Image.new("RGB", size, LIGHT.paper)
    draw = ImageDraw.Draw(sheet)
    lefts = [margin + j * (column + gap) for j in range(len(heads))]
    for left, lines in zip(lefts, heads, strict=True):
        for above, line in enumerate(reversed(lines), 1):
            start = left + (column - text.width(line)) / 2
            text.draw(draw, start, top - gap // 2 - above * text.line_height, line)
    for row, lines, row_height in zip(rows, labels, heights, strict=True):
        middle = top + row_height / 2
        text.draw(draw, gap, middle - len(lines) / 2 * text.line_height, *lines)
        for left, image in zip(lefts, row, strict=True):
            corner = left + (column - width) // 2, round(middle - height / 2)
            sheet.paste(enlarge(image.convert("RGB"), factor), corner)
        top += row_height + gap // 2
    return sheet


def captioned_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Images with a caption below each.

    Args:
        images: of one size; those that are smaller than 128 pixels are enlarged by a whole factor, without smoothing.
        captions: one for each image, such as its prompt; line breaks are kept, and a row grows with its longest one.
        columns: images side by side.
    """
    factor = enlargement(images[0], CELL)
    width, height = images[0].width * factor, images[0].height * factor
    text = Lettering(max(11, width // 24))
    gap = text.size
    lines = [_lines(caption, text, width) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [height + gap // 2 + text.line_height * max(len(lines[i]) for i in row) + gap for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, gap + sum(heights)), LIGHT.paper)
    draw, top = ImageDraw.Draw(sheet), gap
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            sheet.paste(enlarge(images[i], factor), (left, top))
            text.draw(draw, left, top + height + gap // 2, *lines[i])
        top += row_height
    return sheet


def _lines(label: str, text: Lettering, width: float) -> list[str]:
    return [line for part in label.split("\n") for line in text.wrap(part, width)]


def _beside(labels: Sequence[str], text: Lettering, height: int) -> list[list[str]]:
    """Lines of the rows' labels: as narrow as they can be without being taller than an image, up to a limit."""
    for letters in (11, 16, 22, 30, 40):
        lines = [text.wrap(label, letters * text.size) for label in labels]
        if max(map(len, lines)) * text.line_height <= height:
            break
    return lines


def _width(lines: Sequence[str], text: Lettering) -> int:
    return math.ceil(max(text.width(line) for line in lines))
