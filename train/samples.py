"""Sample images of a run, as one captioned picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from stepfuse.data.emoji import to_image
from stepfuse.data.lettering import Lettering, enlarge, enlargement
from stepfuse.rewards.protocol import Pixels

CELL = 128  # pixels: smaller images are enlarged to at least this


def save_samples(file: Path, images: Pixels, labels: Sequence[str], columns: int = 4) -> None:
    """Save a grid of images as PNG, each with its complete caption below.

    Args:
        file: its folder is made.
        images: those that are smaller than 128 pixels are enlarged by a whole factor, without smoothing.
        labels: one for each image, such as its prompt; they are wrapped, and a row grows with its longest one.
        columns: images side by side.
    """
    pictures = [to_image(pixels) for pixels in images]
    factor = enlargement(pictures[0], CELL)
    width, height = pictures[0].width * factor, pictures[0].height * factor
    text = Lettering(max(11, width // 24))
    gap = text.size
    wrapped = [text.wrap(label, width) for label in labels]
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
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
