"""The two towers of a CLIP, as unit vectors: what PickScore, HPSv2 and the aesthetic predictor start from."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from stepfuse.rewards.protocol import Pixels
from stepfuse.rewards.published import Published, load_state

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


def read_config(file: Path, kind: Any) -> Any:
    """A transformers configuration from a file of the published repository.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        return kind.from_dict(json.loads(file.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is no configuration ({error}); delete it and download it again") from error


def load_clip(file: Path, config: CLIPConfig, device: str | torch.device, dtype: torch.dtype) -> CLIPModel:
    """A CLIP with the weights of one file in transformers' layout."""
    return load_model(CLIPModel, config, load_state(file), file).to(device, dtype)


def load_model(
    kind: Any, config: Any, state: dict[str, Tensor], file: Path, *, superfluous: tuple[str, ...] = (), **options: Any
) -> nn.Module:
    """A transformers model with exactly these weights, in float32 on the CPU.

    Args:
        superfluous: how the names begin that the file may have besides.

    Raises:
        ValueError: naming the file and a tensor that is missing, unexpected or of another shape.
    """
    # A buffer in older files, computed now.
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(superfluous)}
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **options,
    )
    for problem in ("missing", "unexpected", "mismatched"):
        if report[f"{problem}_keys"]:
            first = min(map(str, report[f"{problem}_keys"]))
            raise ValueError(f"{file}: {problem} tensors, such as {first}; expected the published layout")
    return model
