"""LoRAs in other tools' formats."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepfuse.data.text_files import write_text
from stepfuse.fuse.lora.factors import Factors, peft_config, peft_state
from stepfuse.fuse.lora.kohya import file_metadata, kohya_name
from stepfuse.fuse.lora.write import sort_metadata

FORMATS = ("diffusers", "peft", "kohya")
PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_peft(output: Path, factors: Mapping[str, Factors], base: str) -> None:
    """A folder as peft saves one."""
    output.mkdir(parents=True, exist_ok=True)
    state = {PEFT_PREFIX + key: value for key, value in peft_state(factors).items()}
    save_file(state, output / PEFT_WEIGHTS, metadata={"format": "pt"})
    config = peft_config(factors) | {"base_model_name_or_path": base, "inference_mode": True}
    write_text(output / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_kohya(
    output: Path, factors: Mapping[str, Factors], config: Mapping[str, Any], *, title: str, prediction: str
) -> None:
    """One file as sd-scripts saves it: each layer's A, B and alpha, which is the same in all layers.

    Raises:
        ValueError: for a DoRA, of which ComfyUI and AUTOMATIC1111 compute something else than peft, and for a bias.
    """
    state: dict[str, Tensor] = {}
    alpha = Counter(float(layer.alpha) for layer in factors.values()).most_common(1)[0][0]
    for module, layer in factors.items():
        if layer.magnitude is not None:
            raise ValueError(
                f"{title!r} is a DoRA, which tools that read kohya's files compute otherwise than it was trained; "
                "export it as diffusers or peft"
            )
        if layer.bias is not None:
            raise ValueError(f"{title!r} has a bias, which kohya's files do not hold; export it as diffusers or peft")
        name, up = kohya_name(module, config), layer.up
        if layer.alpha != alpha:  # diffusers 0.42 gives attention layers the alpha that most layers have
            up = (up.double() * (layer.alpha / alpha)).to(up.dtype)
        state[f"{name}.lora_down.weight"] = layer.down.contiguous()
        state[f"{name}.lora_up.weight"] = up.contiguous()
        state[f"{name}.alpha"] = torch.tensor(alpha)
    first = next(iter(factors.values()))
    metadata = file_metadata(config, title=title, rank=first.rank, alpha=alpha, prediction=prediction)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, output, metadata=metadata)
    sort_metadata(output)
