"""The files of LoRAs that stepfuse writes: diffusers and ComfyUI read every layer of one, or none.

diffusers' plain layout, `PART.….to_q.lora_A.weight`, is one of which ComfyUI reads convolutions and feed-forward layers
and none of the attention, and no alpha at all. Written is diffusers' layout from before peft,
`PART.….attn1.processor.to_q_lora.down.weight`, which both read completely, each layer scaled to alpha = r, so that the
scale is 1 for tools that look for no alpha. A DoRA's magnitudes and biases of B are known to diffusers alone; files
that have some get keys that ComfyUI knows none of.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.factors import Factors, peft_config
from stepfuse.fuse.lora.keys import written_key


def save_lora(file: Path, factors: Mapping[str, Factors], part: str) -> None:
    """Write layers of a network to a file that `pipe.load_lora_weights` reads; the same layers make the same bytes.

    Args:
        file: in a folder that exists.
        factors: by the layer's path.
        part: the pipeline's name of the network.
    """
    scaled = {module: scale_to_one(factors[module]) for module in sorted(factors)}
    guarded = any(layer.dora or layer.has_bias for layer in scaled.values())
    state = {
        f"{part}.{written_key(module, kind, guarded=guarded)}": value
        for module, layer in scaled.items()
        for kind, value in layer.tensors.items()
    }
    config = {f"{part}.{name}": value for name, value in peft_config(scaled).items()}
    save_tensors(file, state, {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)})


def save_tensors(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its metadata in order, which the library leaves to chance: one LoRA, one hash."""
    content = save({key: value.contiguous() for key, value in state.items()})
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(file, "wb") as output:
        output.writelines([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


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
