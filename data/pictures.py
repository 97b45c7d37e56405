"""Pictures from files, encoded bytes and data sets, upright and in RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stepfuse.data.text_files import file_name, printable


def open_picture(source: Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says.

    As diffusers' training scripts and reward packages do, by PIL's `convert("RGB")`: palettes are looked up and
    transparency is dropped. 16-bit grays are scaled to 8 bits, where PIL alone would cut them off. Of an animation it
    is the first frame.

    Args:
        source: a file, what a file holds, or a picture.
        name: what the picture is called in an error message; by default the file.

    Raises:
        ValueError: for a file that is missing or holds no picture, a picture that is cut off, damaged, empty or too
            large, and one of floats, whose range is not known.
    """
    name = name or (file_name(source) if isinstance(source, Path) else "the picture")
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
            return _upright(opened)
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such file") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read: its format is not known") from error
    except Exception as error:  # of a damaged file, PIL raises whatever its decoder runs into
        reason = " ".join(printable(error).split()) or type(error).__name__
        raise ValueError(f"{name} is no picture that can be read: {reason}") from error


def _upright(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"it is empty, {picture.width} × {picture.height} pixels")
    if picture.mode == "F":
        raise ValueError("it holds floats; save it with 8 or 16 bits a channel")
    picture.load()
    turned = ImageOps.exif_transpose(picture)
    assert turned is not None
    if turned.mode.startswith("I"):
        return Image.fromarray(
            (np.asarray(turned).astype(np.int64).clip(0, 65535) / 257).round().astype(np.uint8)
        ).convert("RGB")
    if turned.mode == "P" and isinstance(turned.info.get("transparency"), bytes):
        turned = turned.convert("RGBA")  # PIL warns of the direct conversion, whose colours are the same
    return turned.convert("RGB")
