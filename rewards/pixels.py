"""Pictures as published reward models want them: bicubic resize, crop, CLIP's normalisation."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stepfuse.rewards.protocol import Pixels

# Every published CLIP of OpenAI's and OpenCLIP's normalises so, and BLIP too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 200  # times the shorter side: it is resized whole before the centre is cut out


def normalise(pixels: Pixels) -> Pixels:
    """(pixels - mean) / deviation, channel by channel."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels - mean) / std


def resize_and_crop(images: Pixels, size: int, *, rounded: bool = False) -> Pixels:
    """The shorter side resized to `size`, then the centre cut out; in [0, 1], float32.

    The published models resize pictures of whole bytes by PIL. So does this, to the last bit, unless a gradient is
    wanted: then pixels are resized as real numbers, which differs by PIL's rounding to bytes, along and across, and
    where its filter overshoots black and white.

    Args:
        rounded: an odd margin is rounded to even, as torchvision does; otherwise down, as transformers does.
    """
    if images.requires_grad and torch.is_grad_enabled():
        return resize_and_crop_smoothly(images, size, rounded=rounded)
    height, width = images.shape[-2:]
    target = _shorter_side(height, width, size)
    top, left = _margins(target, size, rounded)
    arrays = to_bytes(images)
    if target != (height, width):
        box = (left, top, left + size, top + size)
        resized = [Image.fromarray(array).resize(target[::-1], Image.Resampling.BICUBIC).crop(box) for array in arrays]
        arrays = np.stack([np.asarray(picture) for picture in resized])
    else:
        arrays = arrays[:, top : top + size, left : left + size]
    return torch.from_numpy(np.ascontiguousarray(arrays)).to(images.device).permute(0, 3, 1, 2).float() / 255


def resize_and_crop_smoothly(images: Pixels, size: int, *, rounded: bool = False) -> Pixels:
    """`resize_and_crop` on real numbers, clamped to [0, 1]: differentiable, and never rounded to bytes."""
    pixels = images.float()
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    target = _shorter_side(height, width, size)
    top, left = _margins(target, size, rounded)
    resized = functional.interpolate(pixels, size=target, mode="bicubic", antialias=True).clamp(0, 1)
    return resized[..., top : top + size, left : left + size]


def resize_and_pad(images: Pixels, size: int) -> Pixels:
    """The longer side resized to `size`, then black bars to a square; real numbers, as HPSv2's package does.

    Bytes are what it gets; they are made of real pixels unless a gradient is wanted. What the bicubic filter
    overshoots is kept.
    """
    smooth = images.requires_grad and torch.is_grad_enabled()
    pixels = images.float() if smooth else (images.float() * 255).round().clamp(0, 255) / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale == 1:
        target = (height, width)
    else:
        target = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = functional.interpolate(pixels, size=target, mode="bicubic", antialias=True)
    below, right = size - target[0], size - target[1]
    return functional.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))


def to_bytes(images: Pixels) -> np.ndarray:
    """Pixels in [0, 1] → uint8 (batch, height, width, 3), rounded to nearest, as an image file holds them."""
    whole: Tensor = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return whole.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"an image of {width} × {height} pixels is more than {LONGEST} times as long as it is wide")
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _margins(target: tuple[int, int], size: int, rounded: bool) -> tuple[int, int]:
    spare = (target[0] - size, target[1] - size)
    top, left = (round(pixels / 2) if rounded else pixels // 2 for pixels in spare)
    return top, left
