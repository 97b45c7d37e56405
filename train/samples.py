"""Sample images of a run, as one labelled picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from stepfuse.data.emoji import to_image
from stepfuse.rewards.protocol import Pixels


def save_samples(file: Path, images: Pixels, labels: Sequence[str], columns: int = 4) -> None:
    """A grid of images with their prompts below, as PNG."""
    side = max(images.shape[-1], 128)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 24)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        left, top = (i % columns) * (side + 8) + 4, (i // columns) * (side + 24) + 4
        sheet.paste(to_image(pixels).resize((side, side * images.shape[-2] // images.shape[-1])), (left, top))
        while len(label) > 4 and draw.textlength(label, font=font) > side:
            label = label[:-2].rstrip("…") + "…"
        draw.text((left, top + side + 2), label, fill="black", font=font)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
