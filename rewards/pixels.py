"""Image preprocessing of published reward models: bicubic resizing, cropping, padding, and normalisation."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from stepfuse.data.devices import to_device
from stepfuse.data.images import from_bytes, to_bytes
from stepfuse.rewards.protocol import Pixels

# Channel means and standard deviations that OpenAI's CLIP, OpenCLIP and BLIP are trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200  # an image is resized completely before it is cropped, so a long strip would need much memory


def normalise(pixels: Pixels) -> Pixels:
    """Return (pixels - mean) / standard deviation, per channel, with the constants of CLIP."""
    mean, std = (to_device(torch.tensor(v), pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels - mean) / std


def resize_and_crop(images: Pixels, size: int, *, round_margins: bool = False) -> Pixels:
    """Resize the shorter side to `size` and crop the centre.

    Without a gradient, 8-bit images are resized with PIL as published models do, and the result equals theirs bit for
    bit. If a gradient is required, `resize_and_crop_smoothly` is used. It differs by PIL's rounding to 8 bits after
    each of its two passes, and where the bicubic filter overshoots black or white.

    Args:
        images: Pixels in [0, 1].
        size: Height and width of the result.
        round_margins: Whether half an odd margin is rounded to even, as torchvision does. Otherwise it is rounded down,
            as transformers does.

    Returns:
        Pixels in [0, 1], float32, of shape (batch, 3, size, size).

    Raises:
        ValueError: If an image is more than 200 times as long as it is wide.
    """
    if images.requires_grad and torch.is_grad_enabled():
        return resize_and_crop_smoothly(images, size, round_margins=round_margins)
    target, top, left = _crop_box(images, size, round_margins)
    box = (left, top, left + size, top + size)
    resized = [Image.fromarray(a).resize(target[::-1], Image.Resampling.BICUBIC).crop(box) for a in to_bytes(images)]
    arrays = np.stack([np.asarray(image) for image in resized])
    return from_bytes(arrays, images.device)


def resize_and_crop_smoothly(images: Pixels, size: int, *, round_margins: bool = False) -> Pixels:
    """Resize and crop differentiably: in float32, clamped to [0, 1], without rounding to 8 bits."""
    pixels = images.float()
    if pixels.shape[-2:] == (size, size):
        return pixels
    target, top, left = _crop_box(pixels, size, round_margins)
    resized = functional.interpolate(pixels, size=target, mode="bicubic", antialias=True).clamp(0, 1)
    return resized[..., top : top + size, left : left + size]


def resize_and_pad(images: Pixels, size: int) -> Pixels:
    """Resize the longer side to `size` and pad to a square with black, as HPSv2's package does.

    Pixels are resized in float32, and values where the bicubic filter overshoots [0, 1] are kept. Before resizing they
    are rounded to 8 bits, unless a gradient is required.
    """
    differentiable = images.requires_grad and torch.is_grad_enabled()
    pixels = images.float() if differentiable else (images.float() * 255).round().clamp(0, 255) / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return functional.pad(pixels, (left, size - width - left, top, size - height - top))


def _crop_box(images: Pixels, size: int, round_margins: bool) -> tuple[tuple[int, int], int, int]:
    """Height and width after the shorter side is resized to `size`, and pixels to crop at the top and at the left."""
    height, width = images.shape[-2:]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"an image has {width} × {height} pixels; expected an aspect ratio of at most {MAX_ASPECT_RATIO}"
        )
    target = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    top, left = (round((side - size) / 2) if round_margins else (side - size) // 2 for side in target)
    return target, top, left
