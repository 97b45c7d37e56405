"""Putting a LoRA's tensors on a network, by peft."""

import warnings

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepfuse.fuse.lora.file import LoRAFile


def adapter_state(unet: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors under peft's keys, by layer: by key peft takes parts of the network for adapters."""
    state = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A:
            state[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
            state[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
            if layer.lora_B[name].bias is not None:
                state[f"{path}.lora_B.bias"] = layer.lora_B[name].bias
            if name in layer.lora_magnitude_vector:
                state[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    return state


def put_on(pipeline: DiffusionPipeline, name: str, lora: LoRAFile, state: dict[str, Tensor]) -> None:
    """Put a file's tensors on the UNet, with peft's configuration made of its checked header alone.

    Raises:
        ValueError: naming a tensor that did not arrive.
    """
    config = {f"unet.{key}": value for key, value in lora.config("unet").items()}
    with warnings.catch_warnings():
        # peft warns of a second adapter on one model: that is what a set is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        pipeline.load_lora_into_unet(
            state,
            network_alphas=None,
            unet=pipeline.unet,
            adapter_name=name,
            metadata=config,
            _pipeline=pipeline,
            low_cpu_mem_usage=True,  # or peft draws random weights first
        )
    loaded = adapter_state(pipeline.unet, name)
    given = {key.removeprefix("unet."): value for key, value in state.items()}
    for key in given.keys() | loaded.keys():
        if (
            key not in given
            or key not in loaded
            or not torch.equal(loaded[key].cpu(), given[key].to(loaded[key].dtype))
        ):
            raise ValueError(f"{lora.file}: LoRA tensor {key} did not load")
        if not bool(torch.isfinite(loaded[key]).all()):
            raise ValueError(f"{lora.file}: LoRA tensor {key} has values beyond {loaded[key].dtype}")
