"""The files of LoRAs that stepfuse writes: diffusers and ComfyUI read every layer of one, or none.

diffusers' plain layout, `unet.….to_q.lora_A.weight`, is one of which ComfyUI reads convolutions and feed-forward layers
and none of the attention, and no alpha at all. Written is diffusers' layout from before peft,
`unet.….attn1.processor.to_q_lora.down.weight`, which both read completely, each layer scaled to alpha = r, so that the
scale is 1 for tools that look for no alpha. A DoRA's magnitudes and biases of B are known to diffusers alone; files
that have some get keys that ComfyUI knows none of.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepfuse.data.library_messages import StableDiffusionPipeline
from stepfuse.data.output_file import atomic_file
from stepfuse.fuse.lora.factors import Factors, peft_config
from stepfuse.fuse.lora.keys import written_key


def save_lora(
    file: Path, factors: Mapping[str, Factors], pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline
) -> None:
    """Write the layers of a UNet to a file that `pipe.load_lora_weights` reads; the same layers make the same bytes.

    Args:
        file: in a folder that exists.
        factors: by the layer's path.
        pipeline_class: any with diffusers' `save_lora_weights`.
    """
    scaled = {module: scale_to_one(factors[module]) for module in sorted(factors)}
    guarded = any(layer.dora or layer.has_bias for layer in scaled.values())
    state = {
        written_key(module, kind, guarded=guarded): value.contiguous()
        for module, layer in scaled.items()
        for kind, value in layer.tensors.items()
    }
    pipeline_class.save_lora_weights(
        file.parent,
        unet_lora_layers=state,
        unet_lora_adapter_metadata=peft_config(scaled),
        weight_name=file.name,
    )
    sort_metadata(file)


def scale_to_one(layer: Factors) -> Factors:
    """The same layer with alpha = r: s (B A x + b) = (s B) A x + s b."""
    scale = layer.scaling
    if scale == 1:
        return replace(layer, alpha=float(layer.rank))

    def scaled(value: Tensor) -> Tensor:
        exact = value.double() * scale
        rounded = exact.to(value.dtype)
        return rounded if torch.equal(rounded.double(), exact) else exact.float()  # of float16 nothing is lost twice

    bias = None if layer.bias is None else scaled(layer.bias)
    return replace(layer, up=scaled(layer.up), bias=bias, alpha=float(layer.rank))


def sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata in order, which the library leaves to chance: one adapter, one hash."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with atomic_file(file) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
