"""CLIP score (Hessel et al. 2021, arXiv:2104.08718) with any CLIP model of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.data.text_files import first_line
from stepfuse.rewards.clip import CLIPReward
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.pixels import resize_and_crop_smoothly


def clip_score(
    name_or_path: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CLIPReward:
    """r = 100 · cos(image, prompt), without the published clamp at 0, so that the gradient is never 0 everywhere.

    Images are resized and cropped in float32, by `resize_and_crop_smoothly`. The model is a hub id or a folder, by
    default the bundled CLIP model of the emoji base; if it cannot be loaded, ValueError is raised.
    """
    source = name_or_path or emoji.CLIP
    try:
        model = CLIPModel.from_pretrained(source, dtype=dtype).to(device)
        tokenizer = CLIPTokenizer.from_pretrained(source)
    except OSError as error:
        expected = f"expected a hub id or a folder ({first_line(error)})"
        raise ValueError(f"no CLIP model at {str(source)!r}; {expected}") from error
    length = model.config.text_config.max_position_embeddings

    def tokenize(prompts: Sequence[str]) -> Int[Tensor, "batch length"]:
        options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokenizer(list(prompts), **options).input_ids

    return CLIPReward(model, tokenize, resize_and_crop_smoothly, factor=100)


CLIP_SCORE = NamedReward(
    build=clip_score,
    source="arXiv:2104.08718; by default the emoji base's CLIP, or clip_score:HUB_ID",
    licence="Apache-2.0; of a hub id, its own",
    unit="100 × cosine",
    weights=14_000_000,
)
