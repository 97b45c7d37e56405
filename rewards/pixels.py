"""Image preprocessing of published reward models: bicubic resizing, cropping, padding, and normalisation."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stepfuse.rewards.protocol import Pixels

# Channel means and standard deviations that OpenAI's CLIP, OpenCLIP and BLIP are trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200  # an image is resized completely before it is cropped, so a long strip would need much memory


def normalise(pixels: Pixels) -> Pixels:
    """Return (pixels - mean) / standard deviation, per channel, with the constants of CLIP."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels - mean) / std


def resize_and_crop(images: Pixels, size: int, *, round_margins: bool = False) -> Pixels:
    """Resize the shorter side to `size` and crop the centre.

    Published models resize 8-bit images with PIL. Without a gradient the result equals theirs bit for bit. If a
    gradient is required, `resize_and_crop_smoothly` is used instead. It differs by PIL's rounding to 8 bits after each
    of its two passes, and where the bicubic filter overshoots black or white.

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
    height, width = images.shape[-2:]
    target = _resized_shape(height, width, size)
    top, left = _margins(target, size, round_margins)
    arrays = to_bytes(images)
    if target != (height, width):
        box = (left, top, left + size, top + size)
        resized = [Image.fromarray(array).resize(target[::-1], Image.Resampling.BICUBIC).crop(box) for array in arrays]
        arrays = np.stack([np.asarray(image) for image in resized])
    else:
        arrays = arrays[:, top : top + size, left : left + size]
    return torch.from_numpy(np.ascontiguousarray(arrays)).to(images.device).permute(0, 3, 1, 2).float() / 255


def resize_and_crop_smoothly(images: Pixels, size: int, *, round_margins: bool = False) -> Pixels:
    """Resize and crop differentiably: in float32, clamped to [0, 1], without rounding to 8 bits."""
    pixels = images.float()
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    target = _resized_shape(height, width, size)
    top, left = _margins(target, size, round_margins)
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
    if scale == 1:
        target = (height, width)
    else:
        target = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = functional.interpolate(pixels, size=target, mode="bicubic", antialias=True)
    vertical, horizontal = size - target[0], size - target[1]
    return functional.pad(
        pixels, (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
    )


def to_bytes(images: Pixels) -> np.ndarray:
    """Convert pixels in [0, 1] to uint8 (batch, height, width, 3), rounded to nearest, as in an image file."""
    rounded: Tensor = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the shorter side is resized to `size`."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"an image has {width} × {height} pixels; expected an aspect ratio of at most {MAX_ASPECT_RATIO}"
        )
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _margins(target: tuple[int, int], size: int, round_margins: bool) -> tuple[int, int]:
    """Pixels to crop at the top and at the left."""
    excess = (target[0] - size, target[1] - size)
    top, left = (round(pixels / 2) if round_margins else pixels // 2 for pixels in excess)
    return top, left
