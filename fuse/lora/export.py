"""LoRAs written in the formats of peft and kohya-ss/sd-scripts."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stepfuse.data.json_file import write_json
from stepfuse.fuse.lora.factors import Factors, peft_config, peft_state
from stepfuse.fuse.lora.names import LayerNames
from stepfuse.fuse.lora.write import save_tensors

PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_peft(output: Path, factors: Mapping[str, Factors], base: str) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads.

    Args:
        base: its name.
    """
    output.mkdir(exist_ok=True)
    state = {PEFT_PREFIX + key: value for key, value in peft_state(factors).items()}
    save_tensors(output / PEFT_WEIGHTS, state, {"format": "pt"})
    config = peft_config(factors) | {"base_model_name_or_path": base, "inference_mode": True}
    write_json(output / PEFT_CONFIG, config, sort_keys=True)


def save_kohya(output: Path, factors: Mapping[str, Factors], names: LayerNames, *, title: str, prediction: str) -> None:
    """Write one file as sd-scripts does: each layer's A, B and alpha, which is the same in all layers.

    Args:
        names: of the layers of the base's network.
        title, prediction: of the LoRA and of the base.

    Raises:
        ValueError: for a DoRA, of which ComfyUI and AUTOMATIC1111 compute something else than peft, and for a bias.
    """
    state: dict[str, Tensor] = {}
    alpha = Counter(float(layer.alpha) for layer in factors.values()).most_common(1)[0][0]
    for module, layer in factors.items():
        if layer.dora:
            raise ValueError(
                f"{title!r} is a DoRA, which tools that read kohya's files compute otherwise than it was trained; "
                "export it as diffusers or peft"
            )
        if layer.has_bias:
            raise ValueError(f"{title!r} has a bias, which kohya's files do not hold; export it as diffusers or peft")
        name, up = names.kohya(module), layer.up
        if layer.alpha != alpha:  # diffusers 0.42 gives attention layers the alpha that most layers have
            up = (up.double() * (layer.alpha / alpha)).to(up.dtype)
        state[f"{name}.lora_down.weight"] = layer.down
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.alpha"] = torch.tensor(alpha)
    first = next(iter(factors.values()))
    metadata = names.kohya_metadata(title=title, rank=first.rank, alpha=alpha, prediction=prediction)
    save_tensors(output, state, metadata)
