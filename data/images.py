"""Pictures from files, encoded bytes and data sets, upright and in RGB."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stepfuse.data.text_files import file_name, printable

PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that PIL limits, and that do not change its pixels
ORIENTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts in which PIL finds EXIF orientations


def open_picture(source: Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """A picture in RGB, turned as its EXIF orientation says.

    As diffusers' training scripts and reward packages do, by PIL's `convert("RGB")`: palettes are looked up and
    transparency is dropped. 16-bit grays are scaled to 8 bits, where PIL alone would cut them off. Of an animation it
    is the first frame. Texts and colour profiles of a PNG that are larger than PIL's limits, such as the workflows that
    ComfyUI saves, are not read.

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
        try:
            return _read(source if isinstance(source, Path) else io.BytesIO(source))
        except ValueError as error:
            data = source.read_bytes() if isinstance(source, Path) else source
            if "MAX_TEXT" not in str(error) or not data.startswith(PNG):
                raise
            return _read(io.BytesIO(_without_texts(data)))
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such file") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read: its format is not known") from error
    except Exception as error:  # of a damaged file, PIL raises whatever its decoder runs into
        reason = " ".join(printable(error).split()) or type(error).__name__
        raise ValueError(f"{name} is no picture that can be read: {reason}") from error


def _read(source: Path | io.BytesIO) -> Image.Image:
    with Image.open(source) as opened:
        return _upright(opened)


def _without_texts(data: bytes) -> bytes:
    """A PNG without its colour profile and its texts, except those that may hold an EXIF orientation."""
    kept, start = [PNG], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])  # length, kind, content and checksum
        kind, content = data[start + 4 : start + 8], data[start + 8 : end - 4]
        if kind not in TEXTS or content.startswith(ORIENTATIONS):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


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


def to_image(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """Pixels in [0, 1] → PIL."""
    array = pixels.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(array.numpy())


def to_pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """PIL → pixels in [0, 1]."""
    rgb = image.convert("RGB")
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return data.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1).float().div(255)
