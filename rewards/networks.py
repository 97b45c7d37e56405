"""Rewards computed by networks: scoring in batches, and loading networks from published files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.data.json_file import read_json
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.published import damage_errors

# Indices of the linear layers in a published head; the indices between them belong to dropout layers.
HEAD_LAYERS = (0, 2, 4, 6, 7)


class NetworkReward(ABC):
    """A reward computed by frozen networks, differentiable in the images.

    If no gradient is required, images are scored in batches of `batch_size`, so that memory does not grow with the
    number of images. Otherwise all images are scored in one forward.

    Rewards with published weights are loaded from a folder with the published files, or from the hub if it is None;
    `dtype` is that of the networks, and scores are float32. If a file is missing and cannot be downloaded, or differs
    from what was published, ValueError is raised.
    """

    batch_size = 16

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


def read_config(file: Path, create: Callable[[dict[str, Any]], Any]) -> Any:
    """Create a configuration from the object in a published JSON file, or raise ValueError."""
    with damage_errors(file, "a configuration"):
        return create(read_json(file, "a published configuration"))


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


def load_model(model_class: Any, config: Any, state: dict[str, Tensor], file: Path, **options: Any) -> Any:
    """Create a frozen transformers model with exactly the weights of `state`, in float32 on the CPU.

    `options` are further arguments of `from_pretrained`. If a tensor is missing, unexpected, or has another shape, a
    ValueError names it and `file`.
    """
    model, report = model_class.from_pretrained(
        None,
        config=config,
        # `position_ids` is a buffer that files of older versions hold and that is computed today.
        state_dict={name: tensor for name, tensor in state.items() if not name.endswith("position_ids")},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **options,
    )
    for problem in ("missing", "unexpected", "mismatched"):
        if report[f"{problem}_keys"]:
            first = min(map(str, report[f"{problem}_keys"]))
            raise ValueError(f"{file}: {problem} tensors, such as {first}; expected the published layout")
    return model.requires_grad_(False).eval()


def load_head(state: Mapping[str, Tensor], file: Path) -> nn.Sequential:
    """Create the head of ImageReward or of the aesthetic predictor: five linear layers without nonlinearities.

    If `state` holds other tensors, or their shapes do not match, a ValueError names `file`.
    """
    with damage_errors(file, "a checkpoint whose head has the published layout"):
        head = nn.Sequential()
        for index in HEAD_LAYERS:
            rows, columns = state[f"layers.{index}.weight"].shape
            head.add_module(str(index), nn.Linear(columns, rows))
        head.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
        head(torch.zeros(1, state["layers.0.weight"].shape[1]))  # each layer takes what the one before it returns
    return head.requires_grad_(False).eval()
