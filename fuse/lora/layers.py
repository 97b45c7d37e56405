"""peft's LoRA layers of a network: which adapters are on, one at a time or merged, and whether they can be merged."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def active_adapter(network: nn.Module, name: str | None) -> Iterator[None]:
    """Run the network with one adapter, or with none, as the base."""
    layers, names = lora_layers(network), [] if name is None else [name]
    check_exist(layers, names)
    with _active(layers, names):
        yield


@contextmanager
def adapter_on_last_rows(network: nn.Module, name: str, first: int) -> Iterator[None]:
    """Run the network, without gradients, with an adapter on the rows from `first` on, and with none on those before.

    Raises:
        ValueError: for an adapter that does not exist, or a DoRA, which is no sum of two outputs.
    """
    layers = lora_layers(network)
    check_mergeable(layers, [name])

    def add(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        down, up = layer.lora_A[name], layer.lora_B[name]
        added = up(down(inputs[0][first:].to(down.weight.dtype)))
        output[first:] += (added * layer.scaling[name]).to(output.dtype)  # in place: there are no gradients

    hooks = [layer.register_forward_hook(add) for layer in layers if name in layer.scaling]
    try:
        with _active(layers, []):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def merged_adapters(network: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Run the network with the LoRA Σ w_i B_i A_i: every adapter's output, scaled, in one forward.

    Raises:
        ValueError: for an adapter that does not exist, or a DoRA, which is not linear in its weight.
    """
    layers = lora_layers(network)
    used = {name: weight for name, weight in weights.items() if weight != 0}
    check_mergeable(layers, list(used))
    with _scaled(layers, used), _active(layers, list(used)):
        yield


@contextmanager
def averaged_factors(network: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Run the network with the LoRA λ (Σ w_i B_i / λ) (Σ w_i A_i / λ), λ = Σ w_i: factors averaged one by one.

    Raises:
        ValueError: for adapters of different rank, alpha or layers, whose factors have no average, or a DoRA.
    """
    layers = lora_layers(network)
    used = {name: weight for name, weight in weights.items() if weight != 0}
    check_factors(layers, list(used))
    strength = sum(used.values())
    if not used or strength == 0:
        with _active(layers, []):
            yield
        return
    first = next(iter(used))  # its factors hold the average meanwhile
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for layer in layers:
            if first not in layer.scaling:
                continue
            for factors in (layer.lora_A, layer.lora_B):
                weight = factors[first].weight
                kept.append((weight, weight.data))
                weight.data = sum(w / strength * factors[name].weight.data for name, w in used.items())
        with _scaled(layers, {first: strength}), _active(layers, [first]):
            yield
    finally:
        for weight, data in kept:
            weight.data = data


@contextmanager
def several_adapters() -> Iterator[None]:
    """Add an adapter to a network that may have others, of which peft warns: here that is what a network is for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


def lora_layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def is_among(path: str, names: Collection[str]) -> bool:
    """Whether a layer, by its path, is one of these names or within one."""
    return not set(names).isdisjoint(path.split("."))


def has_layer_among(network: nn.Module, name: str, names: Collection[str]) -> bool:
    """Whether an adapter has a LoRA on a layer that is one of these names or within one."""
    layers = ((path, module) for path, module in network.named_modules() if isinstance(module, BaseTunerLayer))
    return any(name in layer.scaling and is_among(path, names) for path, layer in layers)


def check_mergeable(layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> None:
    """Check that adapters exist, and are linear in their weights."""
    check_exist(layers, names)
    for name in names:
        if any(layer.use_dora.get(name, False) for layer in layers):
            raise ValueError(f"adapter {name!r} is a DoRA, which cannot be merged by weight; use the rule product")


def check_factors(layers: Sequence[BaseTunerLayer], names: Sequence[str]) -> None:
    """Check that adapters have factors of one shape and scale."""
    check_mergeable(layers, names)
    for name in names:
        if any(layer.lora_bias.get(name, False) for layer in layers):
            raise ValueError(f"adapter {name!r} has a bias, which belongs to neither factor; use the rule soup")
    for layer in layers:
        made = {name: (layer.r[name], layer.scaling[name]) if name in layer.scaling else None for name in names}
        if len(set(made.values())) > 1:
            (one, a), (other, b) = next((x, y) for x in made.items() for y in made.items() if x[1] != y[1])
            raise ValueError(
                f"adapters {one!r} and {other!r} differ in rank, alpha or layers ({a} and {b} as rank and scale), "
                "so their factors have no average; use the rule soup"
            )


def check_exist(layers: Collection[BaseTunerLayer], names: Sequence[str]) -> None:
    """Raise ValueError for an adapter that none of the layers has."""
    for name in names:
        if not any(name in layer.scaling for layer in layers):
            raise ValueError(f"the network has no adapter {name!r}")


@contextmanager
def _scaled(layers: Sequence[BaseTunerLayer], weights: Mapping[str, float]) -> Iterator[None]:
    """Multiply the output of adapters within the block."""
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in weights.keys() & layer.scaling.keys():
                layer.scaling[name] *= weights[name]
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def _active(layers: Sequence[BaseTunerLayer], names: list[str]) -> Iterator[None]:
    """Set flags only: peft's own switches also change `requires_grad`, which training must keep."""
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = not names
        layer._active_adapter = names or layer._active_adapter
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
