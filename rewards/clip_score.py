"""CLIP score (Hessel et al. 2021, arXiv:2104.08718) on any transformers `CLIPModel`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.rewards.protocol import Pixels, Scores

# Every published CLIP of OpenAI's and OpenCLIP's normalises so.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPScore:
    """100 · cos(image, caption), without the published clamp at 0, so that gradients never vanish.

    Args:
        name_or_path: a CLIP model of the hub or a folder; by default the one of the emoji base.
        device: where it runs.

    Raises:
        ValueError: where no CLIP model is found.
    """

    def __init__(self, name_or_path: str | Path = emoji.CLIP, device: str | torch.device = "cpu") -> None:
        try:
            self.model = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32).eval().to(device)
            self.tokenizer = CLIPTokenizer.from_pretrained(name_or_path)
        except OSError as error:
            raise ValueError(
                f"no CLIP model at {str(name_or_path)!r}; expected a hub id or a folder ({str(error).splitlines()[0]})"
            ) from error
        self.model.requires_grad_(False)
        self.size = self.model.config.vision_config.image_size

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return 100 * (self.embed_images(images) * self.embed_prompts(prompts)).sum(1)

    def embed_images(self, images: Pixels) -> Float[Tensor, "batch width"]:
        """Unit vectors: bicubic resize of the shorter side, centre crop, normalisation, image tower."""
        device = self.model.device
        pixels = images.to(device, torch.float32)
        height, width = pixels.shape[-2:]
        if (height, width) != (self.size, self.size):
            short = min(height, width)
            size = (self.size * height // short, self.size * width // short)  # rounded down, as CLIPImageProcessor does
            pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
            pixels = pixels[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
        features = self.model.get_image_features(pixel_values=(pixels - mean) / std)
        return functional.normalize(_pooled(features), dim=1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "batch width"]:
        """Unit vectors of the text tower."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        features = self.model.get_text_features(**tokens.to(self.model.device))
        return functional.normalize(_pooled(features), dim=1)


def _pooled(features: Any) -> Tensor:
    """transformers 5 wraps features in an output object."""
    return getattr(features, "pooler_output", features)
