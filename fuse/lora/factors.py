"""The factors of a LoRA, layer by layer, and peft's tensors and configuration made of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from stepfuse.fuse.lora.config import check_config, layer_settings
from stepfuse.fuse.lora.file import LoRAFile, LoRALayer, check_layers
from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, UP, set_key

NETWORK = "network"  # the part of tensors that peft names without one, in errors


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

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], alpha: float) -> "Factors":
        """By the kinds of tensors, as `tensors` has them."""
        return cls(
            down=tensors[DOWN], up=tensors[UP], alpha=alpha, magnitude=tensors.get(MAGNITUDE), bias=tensors.get(BIAS)
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by their kind in `stepfuse.fuse.lora.keys`."""
        found = {DOWN: self.down, UP: self.up, MAGNITUDE: self.magnitude, BIAS: self.bias}
        return {kind: value for kind, value in found.items() if value is not None}

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is added to."""
        return (len(self.up), *self.down.shape[1:])

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def dora(self) -> bool:
        return self.magnitude is not None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        """The same layer with each of its tensors changed."""
        return Factors.of({kind: change(value) for kind, value in self.tensors.items()}, self.alpha)


def read_factors(lora: LoRAFile, sha256: str | None = None) -> dict[str, Factors]:
    """The network's layers of an open file, by the module's path; with a hash, those of exactly that file.

    Raises:
        ValueError: for another hash, and for numbers that are not finite.
    """
    state = {key.removeprefix(f"{lora.part}."): value for key, value in lora.read(sha256).items()}
    return _from_layers(lora.layers.get(lora.part, {}), state)


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
        split = set_key(f"{NETWORK}.{key}", (NETWORK,))
        if split is None:
            raise ValueError(f"{file}: tensor {key[:100]!r} is not of a LoRA of peft's")
        modules.setdefault(split[1], {})[split[2]] = tuple(value.shape)
    check_config(file, config)
    return _from_layers(check_layers(file, NETWORK, modules, config), state)


def _from_layers(layers: Mapping[str, LoRALayer], state: Mapping[str, Tensor]) -> dict[str, Factors]:
    kinds = (DOWN, UP, MAGNITUDE, BIAS)
    return {
        name: Factors.of(
            {kind: state[f"{name}.{kind}"] for kind in kinds if f"{name}.{kind}" in state}, layer.scaling * layer.rank
        )
        for name, layer in layers.items()
    }


def peft_state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors under peft's keys."""
    return {
        f"{module}.{kind}": value.contiguous()
        for module, layer in factors.items()
        for kind, value in layer.tensors.items()
    }


def peft_config(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's configuration of these layers, each with a rank and an alpha of its own."""
    settings = layer_settings(factors)
    return LoraConfig(**settings).to_dict() | {"target_modules": settings["target_modules"]}  # peft makes a set of them
