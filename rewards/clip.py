"""The two towers of a CLIP, as unit vectors: what PickScore, HPSv2 and the aesthetic predictor start from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from stepfuse.rewards.protocol import Pixels
from stepfuse.rewards.published import Published

# The vocabulary is one for all of OpenAI's and OpenCLIP's; LAION's is read, as PickScore's authors do.
TOKENIZER = Published(
    repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    name="tokenizer.json",
    revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    size=2_224_041,
)


class CLIPTowers:
    """Unit vectors of images and of prompts, in float32.

    Args:
        model: with weights, on its device.
        tokenize: prompts → tokens that end in the end-of-text token.
        prepare: pixels in [0, 1] → normalised ones of the model's size.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenize: Callable[[Sequence[str]], Int[Tensor, "batch length"]],
        prepare: Callable[[Pixels, int], Pixels],
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenize, self.prepare = tokenize, prepare
        self.size = model.config.vision_config.image_size

    def embed_images(self, images: Pixels) -> Float[Tensor, "batch width"]:
        pixels = self.prepare(images.to(self.model.device), self.size)
        return unit(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "batch width"]:
        tokens = self.tokenize(prompts)[:, : self.model.config.text_config.max_position_embeddings]
        return unit(self.model.get_text_features(input_ids=tokens.to(self.model.device)))


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
