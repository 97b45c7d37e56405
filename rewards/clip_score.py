"""CLIP score (Hessel et al. 2021, arXiv:2104.08718) on any transformers `CLIPModel`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.pixels import normalise, resize_and_crop_smoothly
from stepfuse.rewards.protocol import Pixels


def clip_score(
    name_or_path: str | Path = emoji.CLIP,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> CLIPReward:
    """100 · cos(image, caption), without the published clamp at 0, so that gradients never vanish.

    Images are resized as real numbers: bicubic of the shorter side, centre crop.

    Args:
        name_or_path: a CLIP model of the hub or a folder; by default the one of the emoji base.
        device: where it runs.
        dtype: of the model; scores are float32.
        batch_size: images a forward where no gradient is wanted.

    Raises:
        ValueError: where no CLIP model is found.
    """
    try:
        model = CLIPModel.from_pretrained(name_or_path, dtype=dtype).to(device)
        tokenizer = CLIPTokenizer.from_pretrained(name_or_path)
    except OSError as error:
        raise ValueError(
            f"no CLIP model at {str(name_or_path)!r}; expected a hub id or a folder ({str(error).splitlines()[0]})"
        ) from error
    length = model.config.text_config.max_position_embeddings

    def tokenize(prompts: Sequence[str]) -> Int[Tensor, "batch length"]:
        options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokenizer(list(prompts), **options).input_ids

    def prepare(images: Pixels, size: int) -> Pixels:
        return normalise(resize_and_crop_smoothly(images, size))

    return CLIPReward(model, tokenize, prepare, factor=100, batch_size=batch_size)
