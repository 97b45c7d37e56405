"""Rewards computed by networks: scoring in batches, and loading networks from published files."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.data.json_file import read_json
from stepfuse.rewards.protocol import Pixels, Scores

# Indices of the linear layers in a published head; the indices between them belong to dropout layers.
HEAD_LAYERS = (0, 2, 4, 6, 7)


class NetworkReward(ABC):
    """A reward computed by frozen networks, differentiable in the images.

    If no gradient is required, images are scored in batches of `batch_size`, so that memory does not grow with the
    number of images. Otherwise all images are scored in one forward.

    Rewards with published weights (`pickscore`, `hpsv2`, `ImageReward`, `LAIONAesthetic`) share these arguments:

    Args:
        folder: Folder with the published files; by default they are downloaded from the hub.
        device: Device of the networks.
        dtype: Data type of the networks. Scores are float32.
        batch_size: Maximum number of images per forward if no gradient is required.

    Raises:
        ValueError: If a file is missing and cannot be downloaded, or differs from what was published.
    """

    batch_size: int

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        if images.requires_grad and torch.is_grad_enabled():
            return self.score_batch(images, prompts)
        with torch.no_grad():
            scores = [
                self.score_batch(images[start : start + self.batch_size], prompts[start : start + self.batch_size])
                for start in range(0, len(images), self.batch_size)
            ]
        return torch.cat(scores) if scores else torch.zeros(0, device=images.device)

    @abstractmethod
    def score_batch(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        """Score images and their prompts in one forward."""


def read_published_json(file: Path) -> dict[str, Any]:
    """Read a published JSON file that holds an object, or raise ValueError."""
    try:
        return read_json(file, "a published configuration")
    except ValueError as error:
        raise ValueError(f"{error}; delete it and download it again") from error


def read_config(file: Path, config_class: Any) -> Any:
    """Read a transformers configuration of this class from a published file, or raise ValueError."""
    values = read_published_json(file)
    try:
        return config_class.from_dict(values)
    except Exception as error:  # transformers raises many types of exception
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is not a configuration ({reason}); delete it and download it again") from error


def rename(name: str, names: Mapping[str, str], block_names: Mapping[str, str]) -> str:
    """Rename a tensor: the beginning of its name by `names`, and the part of a transformer block by `block_names`."""
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            name = new + name.removeprefix(old)
            break
    for old, new in block_names.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Count the layers of a state dict whose tensors are named `PREFIX` NUMBER `.…`."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def load_model(
    model_class: Any,
    config: Any,
    state: dict[str, Tensor],
    file: Path,
    *,
    ignored_prefixes: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Create a transformers model with exactly the weights of `state`, in float32 on the CPU.

    Tensors whose names start with one of `ignored_prefixes` are not loaded. `options` are for `from_pretrained`.

    Raises:
        ValueError: If a tensor is missing, unexpected, or has another shape. The message names it and `file`.
    """
    loaded = {
        name: tensor
        for name, tensor in state.items()
        # `position_ids` is a buffer that files of older versions hold and that is computed today.
        if not name.endswith("position_ids") and not name.startswith(ignored_prefixes)
    }
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=loaded,
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


def load_head(state: Mapping[str, Tensor], file: Path) -> nn.Sequential:
    """Create the head of ImageReward or of the aesthetic predictor: five linear layers without nonlinearities.

    Raises:
        ValueError: If `state` holds other tensors, or their shapes do not match. The message names `file`.
    """
    try:
        shapes = [state[f"layers.{index}.weight"].shape for index in HEAD_LAYERS]
        layers = {str(index): nn.Linear(*reversed(shape)) for index, shape in zip(HEAD_LAYERS, shapes, strict=True)}
        head = nn.Sequential(OrderedDict(layers))
        head.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
        head(torch.zeros(1, shapes[0][1]))  # the number of columns of each layer is that of rows of the one before
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: the head does not have the published layout: {reason}") from error
    return head.requires_grad_(False).eval()
