"""Rewards that are the cosine of a CLIP's two towers: CLIP score, PickScore and HPSv2."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from stepfuse.rewards.batches import score_in_batches
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.published import Published

# The vocabulary is one for all of OpenAI's and OpenCLIP's; LAION's is read, as PickScore's authors do.
TOKENIZER = Published(
    repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    name="tokenizer.json",
    revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    size=2_224_041,
)


class CLIPReward:
    """r = factor · cos(image, prompt) by the two towers of a CLIP, in float32; differentiable in the images.

    Args:
        model: with weights, on its device.
        tokenize: prompts → tokens that end in the end-of-text token.
        prepare: pixels in [0, 1] → normalised ones of the model's size.
        factor: what the cosine is multiplied by.
        batch_size: images a forward where no gradient is wanted.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenize: Callable[[Sequence[str]], Int[Tensor, "batch length"]],
        prepare: Callable[[Pixels, int], Pixels],
        *,
        factor: float = 1.0,
        batch_size: int = 16,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenize, self.prepare = tokenize, prepare
        self.factor, self.batch_size = factor, batch_size

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return score_in_batches(self._score, images, prompts, self.batch_size)

    def embed_images(self, images: Pixels) -> Float[Tensor, "batch width"]:
        """Unit vectors of the image tower."""
        pixels = self.prepare(images.to(self.model.device), self.model.config.vision_config.image_size)
        return unit(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "batch width"]:
        """Unit vectors of the text tower; candidates of one prompt share one."""
        distinct = list(dict.fromkeys(prompts))
        vectors = unit(self.model.get_text_features(input_ids=self.tokenize(distinct).to(self.model.device)))
        return vectors[[distinct.index(prompt) for prompt in prompts]]

    def _score(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return self.factor * (self.embed_images(images) * self.embed_prompts(prompts)).sum(1)


def unit(features: Any) -> Float[Tensor, "batch width"]:
    """Unit vectors in float32; transformers 5 wraps features in an output object."""
    return functional.normalize(getattr(features, "pooler_output", features).float(), dim=1)


def load_clip_tokenizer(file: Path, length: int) -> Callable[[Sequence[str]], Int[Tensor, "batch length"]]:
    """From tokenizer.json alone: whatever is cut off, the end-of-text token stays, and the rest is padded with it.

    What follows the first of these is never looked at: attention is causal, and the text's feature is taken there.

    Raises:
        ValueError: for a file that is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer ({error}); delete it and download it again") from error
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
        raise ValueError(f"{file} has no token <|endoftext|>; expected the tokenizer of a CLIP")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=end, pad_token="<|endoftext|>")

    def tokenize(prompts: Sequence[str]) -> Int[Tensor, "batch length"]:
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))])

    return tokenize
