"""The factors of a LoRA, layer by layer: as peft's tensors and settings, and on a network, as peft holds them there."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, UP, written_key
from stepfuse.fuse.lora.layers import several_adapters


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The LoRA of one layer, W + (alpha / r) B A; of a file of which only the header was read, meta tensors.

    Attributes:
        down: A, (r, in) or (r, in, k, k).
        up: B, (out, r) or (out, r, 1, 1).
        alpha: the numerator of the scale, which for rsLoRA includes √r.
        magnitude: of a DoRA (arXiv:2402.09353).
        bias: of B.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], alpha: float) -> "Factors":
        """The inverse of `tensors`."""
        return cls(
            down=tensors[DOWN], up=tensors[UP], alpha=alpha, magnitude=tensors.get(MAGNITUDE), bias=tensors.get(BIAS)
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by their kind in `stepfuse.fuse.lora.keys`."""
        found = {DOWN: self.down, UP: self.up, MAGNITUDE: self.magnitude, BIAS: self.bias}
        return {kind: value for kind, value in found.items() if value is not None}

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it is added to."""
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


def peft_state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors under peft's keys."""
    return {
        f"{module}.{kind}": value.contiguous()
        for module, layer in factors.items()
        for kind, value in layer.tensors.items()
    }


def written_state(factors: Mapping[str, Factors], part: str) -> dict[str, Tensor]:
    """Tensors under the keys of the files that stepfuse writes."""
    guarded = any(layer.dora or layer.has_bias for layer in factors.values())
    return {
        f"{part}.{written_key(module, kind, guarded=guarded)}": value
        for module, layer in factors.items()
        for kind, value in layer.tensors.items()
    }


def peft_settings(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's settings: the most frequent rank and alpha, and patterns for the layers that have others."""
    ranks = {module: layer.rank for module, layer in factors.items()}
    alphas = {module: layer.alpha for module, layer in factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(factors),
        "use_dora": any(layer.dora for layer in factors.values()),
        "lora_bias": any(layer.has_bias for layer in factors.values()),
    }


def peft_config(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's whole configuration, with its defaults for all other settings."""
    settings = peft_settings(factors)
    return LoraConfig(**settings).to_dict() | {"target_modules": settings["target_modules"]}  # peft makes a set of them


def network_factors(network: nn.Module, name: str, state: Mapping[str, Tensor] | None = None) -> dict[str, Factors]:
    """The layers of an adapter on a network, by the module's path.

    Args:
        state: other tensors of the adapter under peft's keys, such as those of an earlier step of its training.
    """
    # Not by peft's function, which takes parts of the network for adapters that are named like them.
    factors = {}
    for path, layer in network.named_modules():
        if not isinstance(layer, BaseTunerLayer) or name not in layer.lora_A:
            continue
        tensors = {DOWN: layer.lora_A[name].weight, UP: layer.lora_B[name].weight}
        if layer.lora_B[name].bias is not None:
            tensors[BIAS] = layer.lora_B[name].bias
        if name in layer.lora_magnitude_vector:
            tensors[MAGNITUDE] = layer.lora_magnitude_vector[name].weight
        if state is not None:
            tensors = {kind: state[f"{path}.{kind}"] for kind in tensors}
        factors[path] = Factors.of(tensors, layer.scaling[name] * layer.r[name]).map(Tensor.detach)
    return factors


def put_on(network: Any, name: str, file: Path, factors: Mapping[str, Factors]) -> None:
    """Put a LoRA on a network by peft, configured by its layers alone.

    Args:
        network: a model of diffusers.
        name: of the adapter.
        file: named in errors.

    Raises:
        ValueError: naming a tensor that did not arrive.
    """
    given = peft_state(factors)
    with several_adapters():
        network.load_lora_adapter(
            given,
            prefix=None,
            adapter_name=name,
            metadata=peft_settings(factors),
            low_cpu_mem_usage=True,  # or peft draws random weights first
        )
    loaded = peft_state(network_factors(network, name))
    for key in given.keys() | loaded.keys():
        if (
            key not in given
            or key not in loaded
            or not torch.equal(loaded[key].cpu(), given[key].to(loaded[key].dtype))
        ):
            raise ValueError(f"{file}: LoRA tensor {key} did not load")
        if not bool(torch.isfinite(loaded[key]).all()):
            raise ValueError(f"{file}: LoRA tensor {key} has values beyond {loaded[key].dtype}")
