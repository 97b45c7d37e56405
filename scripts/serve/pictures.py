"""Images as files: with their settings inside, as a labelled strip, or as an animated loop."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from stepfuse.data.grid import labelled_grid
from stepfuse.data.images import to_image
from stepfuse.data.lettering import enlarge, enlargement
from stepfuse.fuse.rules.weights import parse_weights
from stepfuse.fuse.sampling.pictures import weights_heading

KEYWORD = "stepfuse"  # of the PNG chunk with the settings
FRAME_MILLISECONDS = 120
LABEL = 200  # characters of a prompt beside a strip
LOOP_PIXELS = 256  # the least width or height of a loop


def files_of(pixels: Tensor, settings: Sequence[Mapping[str, Any]], layout: str, output_format: str) -> list[bytes]:
    """The files of a request: one an image, or one of all.

    Args:
        pixels: in [0, 1].
        settings: of each file.
        layout: images, strip or loop.
    """
    images = [to_image(each) for each in pixels]
    if layout == "loop":
        return [_loop(images, output_format)]
    if layout == "strip":
        (of_all,) = settings
        prompt = str(of_all["prompt"])
        label = prompt if len(prompt) <= LABEL else prompt[: LABEL - 1] + "…"
        images = [labelled_grid([images], [label], _headings(of_all, len(images)))]
    return [encode(image, each, output_format) for image, each in zip(images, settings, strict=True)]


def encode(image: Image.Image, settings: Mapping[str, Any], output_format: str) -> bytes:
    """An image as a file; a PNG has the settings as JSON in an iTXt chunk."""
    file = io.BytesIO()
    if output_format == "png":
        texts = PngInfo()
        texts.add_itxt(KEYWORD, json.dumps(settings, ensure_ascii=False))
        image.save(file, "png", pnginfo=texts)
    elif output_format == "webp":
        image.save(file, "webp", lossless=True)
    else:
        image.save(file, "jpeg", quality=95)
    return file.getvalue()


def _loop(images: Sequence[Image.Image], output_format: str) -> bytes:
    """There and back again, without an end."""
    frames = [enlarge(image, enlargement(image, LOOP_PIXELS)) for image in images]
    frames += frames[-2:0:-1]
    file = io.BytesIO()
    more: dict[str, Any] = {"lossless": True} if output_format == "webp" else {"disposal": 1, "optimize": False}
    frames[0].save(
        file, output_format, save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0, **more
    )
    return file.getvalue()


def _headings(settings: Mapping[str, Any], count: int) -> list[str]:
    """The weights of each image of a strip, or its seed where they are all the same."""
    weights = settings["weights"]
    if not isinstance(weights, list):
        return [f"seed {settings['seed'] + index}" for index in range(count)]
    return [weights_heading(parse_weights(each) if isinstance(each, str) else each) for each in weights]
