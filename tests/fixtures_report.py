"""The pictures of a small evaluation, and which one a picture of its page is."""

import base64
import io

from PIL import Image


def png(colour: tuple[int, ...], side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def kept_png(number: int, prompt: int) -> bytes:
    """The picture that is kept of a cell: its colour says which cell and prompt, also after lossy compression."""
    return png((4 * number, 80 * prompt, 99))


def cell_and_prompt(source: str) -> tuple[int, int]:
    """The cell and the prompt that the picture of a page belongs to."""
    kind, data = source.split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        red, green, _ = image.convert("RGB").getpixel((0, 0))
    return round(red / 4), round(green / 80)
