"""Putting a LoRA's tensors on a network, by peft."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepfuse.fuse.lora.file import LoRAFile


def adapter_state(network: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors under peft's keys, by layer: by key peft takes parts of the network for adapters."""
    state = {}
    for path, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A:
            state[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
            state[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
            if layer.lora_B[name].bias is not None:
                state[f"{path}.lora_B.bias"] = layer.lora_B[name].bias
            if name in layer.lora_magnitude_vector:
                state[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    return state


def put_on(network: Any, part: str, name: str, lora: LoRAFile, state: dict[str, Tensor]) -> None:
    """Put a file's tensors on a network, with peft's configuration made of its checked header alone.

    Args:
        network: a model of diffusers.
        part: its name in the pipeline, with which the tensors' names begin.
        name: of the adapter.

    Raises:
        ValueError: naming a tensor that did not arrive.
    """
    with warnings.catch_warnings():
        # peft warns of a second adapter on one model: that is what a set is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        network.load_lora_adapter(
            state,
            prefix=part,
            adapter_name=name,
            metadata={f"{part}.{key}": value for key, value in lora.config(part).items()},
            low_cpu_mem_usage=True,  # or peft draws random weights first
        )
    loaded = adapter_state(network, name)
    given = {key.removeprefix(f"{part}."): value for key, value in state.items()}
    for key in given.keys() | loaded.keys():
        if (
            key not in given
            or key not in loaded
            or not torch.equal(loaded[key].cpu(), given[key].to(loaded[key].dtype))
        ):
            raise ValueError(f"{lora.file}: LoRA tensor {key} did not load")
        if not bool(torch.isfinite(loaded[key]).all()):
            raise ValueError(f"{lora.file}: LoRA tensor {key} has values beyond {loaded[key].dtype}")
