"""Reading images from files, encoded bytes and data sets, and conversion between PIL images and tensors."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stepfuse.data.text_files import file_name, printable

PNG = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # PNG chunks whose size PIL limits; they do not affect pixels
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts where PIL reads EXIF orientations


def open_picture(source: Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Read an image in RGB, rotated and flipped by its EXIF orientation.

    Images are converted by PIL's `convert("RGB")`, as diffusers' training scripts and reward packages do: palettes are
    looked up, transparency is discarded, and only the first frame of an animation is read. 16-bit grayscale is scaled
    to 8 bits, where PIL alone would clip it. PNG texts and colour profiles that exceed PIL's limits, such as the
    workflows that ComfyUI saves, are ignored.

    `source` is the path of a file, its content, or an image; error messages call it `name`, by default the path.

    Raises:
        ValueError: If the file is missing or is not an image, if the image is truncated, corrupt, empty or too large,
            or if its pixels are floats, whose range is unknown.
    """
    name = name or (file_name(source) if isinstance(source, Path) else "the image")
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
        raise ValueError(f"{name} is not a readable image: unknown format") from error
    except Exception as error:  # the decoders of PIL raise many types of exception for corrupt files
        reason = " ".join(printable(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a readable image: {reason}") from error


def _read(source: Path | io.BytesIO) -> Image.Image:
    with Image.open(source) as opened:
        return _upright(opened)


def _without_texts(data: bytes) -> bytes:
    """Remove the colour profile and the texts of a PNG, except texts that may hold an EXIF orientation."""
    kept, start = [PNG], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])  # length, chunk type, content and checksum
        chunk_type, content = data[start + 4 : start + 8], data[start + 8 : end - 4]
        if chunk_type not in TEXT_CHUNKS or content.startswith(ORIENTATION_TEXTS):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """The image in RGB, transposed by its EXIF orientation."""
    if 0 in image.size:
        raise ValueError(f"the image is empty ({image.width} × {image.height} pixels)")
    if image.mode == "F":
        raise ValueError("its pixels are floats; save it with 8 or 16 bits per channel")
    image.load()
    upright = ImageOps.exif_transpose(image)
    assert upright is not None
    if upright.mode.startswith("I"):
        gray = (np.asarray(upright).astype(np.int64).clip(0, 65535) / 257).round().astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if upright.mode == "P" and isinstance(upright.info.get("transparency"), bytes):
        upright = upright.convert("RGBA")  # avoids a warning of PIL; the colours are the same
    return upright.convert("RGB")


def to_bytes(pixels: Float[Tensor, "*batch 3 height width"]) -> np.ndarray:
    """Convert pixels in [0, 1] to uint8 (*batch, height, width, 3), rounded to nearest, as in an image file."""
    rounded = (pixels.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return rounded.movedim(-3, -1).contiguous().cpu().numpy()


def from_bytes(array: np.ndarray, device: str | torch.device = "cpu") -> Float[Tensor, "*batch 3 height width"]:
    """Convert uint8 (*batch, height, width, 3) to pixels in [0, 1]."""
    return torch.from_numpy(array).to(device).movedim(-1, -3).float() / 255


def to_image(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """Convert pixels in [0, 1] to an 8-bit PIL image, rounded to nearest."""
    return Image.fromarray(to_bytes(pixels))


def to_pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Convert a PIL image to RGB pixels in [0, 1]."""
    return from_bytes(np.array(image.convert("RGB")))
