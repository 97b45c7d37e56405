"""The factors of a LoRA, layer by layer, and peft's tensors and configuration made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import Tensor

from stepfuse.fuse.lora_file import LoRAFile


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


def read_factors(lora: LoRAFile, sha256: str | None = None) -> dict[str, Factors]:
    """The UNet's layers of a checked file, by the module's path."""
    state = lora.read(sha256)

    def own(name: str, what: str) -> Tensor | None:
        return state.get(f"unet.{name}.{what}")

    return {
        name: Factors(
            down=state[f"unet.{name}.lora_A.weight"],
            up=state[f"unet.{name}.lora_B.weight"],
            alpha=layer.scaling * layer.rank,
            magnitude=own(name, "lora_magnitude_vector"),
            bias=own(name, "lora_B.bias"),
        )
        for name, layer in lora.layers.get("unet", {}).items()
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
    ).to_dict()
