"""LoRAs on a network, as peft holds them: put there, and read from there."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepfuse.fuse.lora.factors import Factors, peft_settings, peft_state
from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, UP


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
    with warnings.catch_warnings():
        # peft warns of a second adapter on one model: that is what a set is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
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
