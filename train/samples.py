"""Sample images of a run, as one captioned picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from stepfuse.data.images import to_image
from stepfuse.data.lettering import Lettering, enlarge, enlargement
from stepfuse.rewards.protocol import Pixels

CELL = 128  # pixels: smaller images are enlarged to at least this


def save_samples(file: Path, images: Pixels, labels: Sequence[str], columns: int = 4) -> None:
    """Save a grid of images as PNG, each with its complete caption below; see `draw_samples`.

    Args:
        file: its folder is made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_samples([to_image(pixels) for pixels in images], labels, columns).save(file)


def draw_samples(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 4) -> Image.Image:
    """Draw a grid of images, each with its complete caption below.

    Args:
        pictures: those that are smaller than 128 pixels are enlarged by a whole factor, without smoothing.
        labels: one for each image, such as its prompt; they are wrapped, line breaks in them are kept, and a row grows
            with its longest one.
        columns: images side by side.
    """
    factor = enlargement(pictures[0], CELL)
    width, height = pictures[0].width * factor, pictures[0].height * factor
    text = Lettering(max(11, width // 24))
    gap = text.size
    wrapped = [[line for part in label.split("\n") for line in text.wrap(part, width)] for label in labels]
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [height + gap // 2 + text.line_height * max(len(wrapped[i]) for i in row) + gap for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, gap + sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for row, tall in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            sheet.paste(enlarge(pictures[i], factor), (left, top))
            for k, line in enumerate(wrapped[i]):
                text.draw(draw, left, top + height + gap // 2 + (k + 0.5) * text.line_height, line)
        top += tall
    return sheet


def beside(first: Image.Image, second: Image.Image) -> Image.Image:
    """Two images of one size, side by side."""
    pair = Image.new("RGB", (first.width + second.width, first.height))
    pair.paste(first, (0, 0))
    pair.paste(second, (first.width, 0))
    return pair
