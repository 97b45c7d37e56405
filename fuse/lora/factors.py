"""The factors of a LoRA, layer by layer, and peft's tensors and configuration made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from stepfuse.fuse.lora.file import LoRAFile, LoRALayer, check_config, check_layers
from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, UP, set_key


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The LoRA of one layer, W + (alpha / r) B A.

    Attributes:
        down: A, (r, in) or (r, in, k, k).
        up: B, (out, r) or (out, r, 1, 1).
        alpha: its numerator, rsLoRA's root in it.
        magnitude: of a DoRA.
        bias: of B.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer it is of."""
        return (len(self.up), *self.down.shape[1:])

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def half(self) -> "Factors":
        """The same layer in float16."""
        magnitude, bias = (None if value is None else value.half() for value in (self.magnitude, self.bias))
        return replace(self, down=self.down.half(), up=self.up.half(), magnitude=magnitude, bias=bias)


def read_factors(lora: LoRAFile, sha256: str | None = None) -> dict[str, Factors]:
    """The UNet's layers of a checked file, by the module's path."""
    state = lora.read(sha256)
    return _from_layers(lora.layers.get("unet", {}), {key.removeprefix("unet."): value for key, value in state.items()})


def state_factors(file: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Factors]:
    """The layers of an adapter that peft holds.

    Args:
        file: that it is meant for, named in errors.
        state: tensors under peft's keys, without a part.
        config: peft's.

    Raises:
        ValueError: for tensors that do not go together, or a configuration of something else than a LoRA.
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in state.items():
        split = set_key(f"unet.{key}")
        if split is None:
            raise ValueError(f"{file}: tensor {key[:100]!r} is not of a LoRA of peft's")
        modules.setdefault(split[1], {})[split[2]] = tuple(value.shape)
    check_config(file, config)
    return _from_layers(check_layers(file, "unet", modules, config), state)


def _from_layers(layers: Mapping[str, LoRALayer], state: Mapping[str, Tensor]) -> dict[str, Factors]:
    return {
        name: Factors(
            down=state[f"{name}.{DOWN}"],
            up=state[f"{name}.{UP}"],
            alpha=layer.scaling * layer.rank,
            magnitude=state.get(f"{name}.{MAGNITUDE}"),
            bias=state.get(f"{name}.{BIAS}"),
        )
        for name, layer in layers.items()
    }


def peft_state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors under peft's keys."""
    state: dict[str, Tensor] = {}
    for module, layer in factors.items():
        state[f"{module}.lora_A.weight"] = layer.down.contiguous()
        state[f"{module}.lora_B.weight"] = layer.up.contiguous()
        if layer.magnitude is not None:
            state[f"{module}.lora_magnitude_vector"] = layer.magnitude.contiguous()
        if layer.bias is not None:
            state[f"{module}.lora_B.bias"] = layer.bias.contiguous()
    return state


def peft_config(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's configuration of these layers, each with a rank and an alpha of its own."""
    first = next(iter(factors.values()))
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={f"^{m}": layer.rank for m, layer in factors.items() if layer.rank != first.rank},
        alpha_pattern={f"^{m}": layer.alpha for m, layer in factors.items() if layer.alpha != first.alpha},
        target_modules=sorted(factors),
        use_dora=first.magnitude is not None,
        lora_bias=first.bias is not None,
    ).to_dict() | {"target_modules": sorted(factors)}  # peft makes a set of them, in any order
