"""The worker of a published reward, run in the environment of its package, where stepfuse is not installed."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class Original:
    """A published reward with random weights in its published layout, which scores one image at a time.

    Args:
        name: of the file `NAME_model.py` beside this one, whose `load` writes the weights and returns the function
            that scores.
        folder: where the published layout goes.
        example: image_reward_original.py of the reward configurations.
        size: `published`, or `small`: two layers in each encoder.
        threads: of torch.
        more: further arguments of `load`.
    """

    def __init__(self, name: str, folder: str, example: str, size: str, threads: int, **more: Any) -> None:
        torch.set_num_threads(threads)
        sys.path.append(str(Path(example).parent))
        importlib.import_module("image_reward_original").define_operators()
        self.score = importlib.import_module(f"{name}_model").load(Path(folder), size, **more)

    @torch.no_grad()
    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        return [self.score(Image.fromarray(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
