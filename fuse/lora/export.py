"""The files of LoRAs that stepfuse writes: its own, and those of peft and kohya-ss/sd-scripts.

Of diffusers' plain layout, `PART.….to_q.lora_A.weight`, ComfyUI reads convolutions and feed-forward layers and none of
the attention, and no alpha at all. `save_lora` writes diffusers' layout from before peft,
`PART.….attn1.processor.to_q_lora.down.weight`, which both read completely, each layer scaled to alpha = r, so that the
scale is 1 for tools that look for no alpha. A DoRA's magnitudes and biases of B are known to diffusers alone; files
that have some get keys that ComfyUI knows none of.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from stepfuse.data.json_file import write_json
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.factors import Factors, peft_config, peft_state, scale_to_one, written_state
from stepfuse.fuse.lora.joined_layers import join_all
from stepfuse.fuse.lora.names import LayerNames

PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_lora(file: Path, factors: Mapping[str, Factors], part: str) -> None:
    """Write layers of a network to a file that `pipe.load_lora_weights` reads; the same layers make the same bytes.

    Args:
        file: in a folder that exists.
        factors: by the layer's path.
        part: the pipeline's name of the network.
    """
    scaled = {module: scale_to_one(factors[module]) for module in sorted(factors)}
    config = {f"{part}.{name}": value for name, value in peft_config(scaled).items()}
    save_tensors(
        file, written_state(scaled, part), {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)}
    )


def save_tensors(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its metadata in order, which the library leaves to chance: one LoRA, one hash."""
    content = save({key: value.contiguous() for key, value in state.items()})
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with open(file, "wb") as output:
        output.writelines([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def save_peft(output: Path, factors: Mapping[str, Factors], base: str) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads, with the name of the base."""
    output.mkdir(exist_ok=True)
    state = {PEFT_PREFIX + key: value for key, value in peft_state(factors).items()}
    save_tensors(output / PEFT_WEIGHTS, state, {"format": "pt"})
    config = peft_config(factors) | {"base_model_name_or_path": base, "inference_mode": True}
    write_json(output / PEFT_CONFIG, config, sort_keys=True)


def save_kohya(output: Path, factors: Mapping[str, Factors], names: LayerNames, *, title: str, prediction: str) -> None:
    """Write one file as sd-scripts does: A, B and alpha of each of its layers, which may be made of several.

    Args:
        names: of the layers of the base's network.
        title, prediction: of the LoRA and of the base.

    Raises:
        ValueError: for a layer that has no name there, for a DoRA, of which ComfyUI and AUTOMATIC1111 compute something
            else than peft, and for a bias.
    """
    for layer in factors.values():
        if layer.dora:
            raise ValueError(
                f"{title!r} is a DoRA, which tools that read kohya's files compute otherwise than it was trained; "
                "export it as diffusers or peft"
            )
        if layer.has_bias:
            raise ValueError(f"{title!r} has a bias, which kohya's files do not hold; export it as diffusers or peft")
    if not names.one_alpha:
        factors = {module: scale_to_one(layer) for module, layer in factors.items()}
    most = Counter(float(layer.alpha) for layer in factors.values()).most_common(1)[0][0]
    state: dict[str, Tensor] = {}
    for name, layer in join_all(factors, names).items():
        up, alpha = layer.up, layer.alpha
        if names.one_alpha and alpha != most:
            up, alpha = (up.double() * (alpha / most)).to(up.dtype), most
        state[f"{name}.lora_down.weight"] = layer.down
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.alpha"] = torch.tensor(alpha)
    first = next(iter(factors.values()))
    metadata = names.kohya_metadata(title=title, rank=first.rank, alpha=most, prediction=prediction)
    save_tensors(output, state, metadata)
