"""Rewards that are the cosine similarity of a CLIP model: CLIP score, PickScore and HPSv2."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from stepfuse.data.devices import to_device
from stepfuse.rewards.networks import NetworkReward
from stepfuse.rewards.pixels import normalise
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.published import Published, damage_errors

Tokenize = Callable[[Sequence[str]], Int[Tensor, "batch length"]]

# All CLIP models of OpenAI and OpenCLIP share one vocabulary. PickScore's authors load it from this repository.
TOKENIZER = Published(
    repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    name="tokenizer.json",
    revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    size=2_224_041,
)


class CLIPReward(NetworkReward):
    """r = factor · cos(image embedding, text embedding), in float32.

    `tokenize` returns token ids, whose rows end with the end-of-text token. `resize` is a function of pixels in [0, 1]
    and the model's image size.
    """

    def __init__(
        self, model: CLIPModel, tokenize: Tokenize, resize: Callable[[Pixels, int], Pixels], *, factor: float = 1.0
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenize, self.resize, self.factor = tokenize, resize, factor

    def embed_images(self, images: Pixels) -> Float[Tensor, "batch width"]:
        """Return image embeddings of norm 1."""
        pixels = self.resize(images.to(self.model.device), self.model.config.vision_config.image_size)
        return unit_vectors(self.model.get_image_features(pixel_values=normalise(pixels).to(self.model.dtype)))

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "batch width"]:
        """Return text embeddings of norm 1. A prompt that occurs several times is embedded once."""
        distinct = list(dict.fromkeys(prompts))
        vectors = unit_vectors(
            self.model.get_text_features(input_ids=to_device(self.tokenize(distinct), self.model.device))
        )
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return vectors[to_device(rows, vectors.device)]

    def score_batch(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        return self.factor * (self.embed_images(images) * self.embed_prompts(prompts)).sum(1)


def unit_vectors(features: Any) -> Float[Tensor, "batch width"]:
    """Normalise features to norm 1 in float32. Since transformers 5 they are an attribute of an output object."""
    return functional.normalize(getattr(features, "pooler_output", features).float(), dim=1)


def load_clip_tokenizer(file: Path, length: int, clean: Callable[[str], str] = str) -> Tokenize:
    """Load the tokenizer of a CLIP model from its tokenizer.json, or raise ValueError if it is none.

    Prompts are converted by `clean`, truncated to `length` tokens with the end-of-text token kept, and padded with that
    token. Padding does not change an embedding: attention is causal, and the embedding is read at the first end-of-text
    token.
    """
    with damage_errors(file, "a tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
        raise ValueError(f"{file} has no token <|endoftext|>; expected the tokenizer of a CLIP model")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=end, pad_token="<|endoftext|>")

    def tokenize(prompts: Sequence[str]) -> Int[Tensor, "batch length"]:
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(map(clean, prompts)))])

    return tokenize
