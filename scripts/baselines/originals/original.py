"""The worker of a published reward, run in the environment of its package, where stepfuse is not installed."""

import importlib
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class Original:
    """A published reward with random weights in its published layout, which scores one image at a time.

    `NAME_model.py` beside this file has a function `load`, which writes weights that `fill` makes into the folder and
    returns the function that scores. `example` is image_reward_original.py of the reward configurations, `size` is
    `published`, or `small` with two layers in each encoder, and `more` are further arguments of `load`.
    """

    def __init__(self, name: str, folder: str, example: str, size: str, threads: int, **more: Any) -> None:
        torch.set_num_threads(threads)
        sys.path.append(str(Path(example).parent))
        importlib.import_module("image_reward_original").define_operators()
        self.score = importlib.import_module(f"{name}_model").load(Path(folder), size, fill, **more)

    @torch.no_grad()
    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        return [self.score(Image.fromarray(image), prompt) for image, prompt in zip(images, prompts, strict=True)]


def fill(model: torch.nn.Module) -> None:
    """Random weights by name, the same on every machine: matrices keep the size of what they multiply.

    With default weights some heads score all images alike; these distinguish images.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 0:  # a logit scale stays
                parameter.copy_(random_tensor(name, parameter.shape))


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return values / values[0].numel() ** 0.5
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
