"""One forward for rows with different mixtures of LoRAs, differentiable in the LoRAs.

    y_k = W x_k + Σ_i w_ki s_i B_i A_i x_k

`BatchedAdapters` computes the same from copies, without gradients, for sampling.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from stepfuse.data.devices import to_device
from stepfuse.fuse.lora.batched import add_stack, check_batched_layer
from stepfuse.fuse.lora.layers import check_exist
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.lora.routes import RecentRoutes

RowWeights = Float[Tensor, "rows adapters"]


class AdapterRows:
    """The adapters of a network, each row of a batch with weights of its own; a `Router` for training.

    Gradients reach every adapter, by a factor of 0 where its weight is 0, so that each has one in every step.

    Args:
        network: with LoRAs on it, by peft.
        names: of the adapters, in the order that columns of weights refer to.
        unbatched: names of layers that do not keep the rows of a batch apart (`Backbone.unbatched`).
        as_modules: call each factor as a module, which is slower: for ZeRO-3, which gathers the parameters of a module
            when it is called.

    Raises:
        ValueError: naming the adapter and the layer, for a DoRA, and for kinds of LoRA that cannot be batched.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], unbatched: Collection[str] = (), *, as_modules: bool = False
    ) -> None:
        self.network, self.names = network, tuple(names)
        self.route: RowWeights | None = None
        self._recent: RecentRoutes[RowWeights] = RecentRoutes()
        layers = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
        check_exist(layers.values(), names)
        remedy = "train with lora_target_modules that leave it out"
        for path, layer in layers.items():
            for name in names:
                if layer.use_dora.get(name, False):
                    why = "which is not linear in its weight, and cannot be trained with others"
                    raise ValueError(f"adapter {name!r} is a DoRA, {why}")
                if name in layer.r:
                    check_batched_layer(layer, path, name, unbatched, remedy)
        for layer in layers.values():
            if any(name in layer.r for name in names):
                add_stack(layer, self, _WeightedRows(layer, names, as_modules=as_modules))

    def route_of(self, networks: Sequence[Network], device: torch.device) -> RowWeights:
        """The weights of each row's adapters, in the network's precision and at least float32."""
        dtype = torch.promote_types(next(self.network.parameters()).dtype, torch.float32)

        def make() -> RowWeights:
            rows = [dict(network.weights) for network in networks]
            weights = torch.tensor([[row.get(name, 0.0) for name in self.names] for row in rows], dtype=dtype)
            return to_device(weights, device)

        return self._recent.get((tuple(networks), device, dtype), make)

    @contextmanager
    def routed(self, route: RowWeights) -> Iterator[None]:
        """Run the network with these weights on the rows of its batch."""
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before

    @property
    def fixed(self) -> bool:
        """Never: its routes are plain tensors."""
        return False

    def fix(self, rows: int, device: torch.device) -> None:
        """Nothing, see `fixed`."""

    def release(self) -> None:
        """Nothing: it keeps no merged weights."""


class _WeightedRows(nn.Module):
    """The forward of one of peft's LoRA layers with weights for each row.

    The factors of all adapters are concatenated, so that they are one LoRA of rank Σ r_i whose inner activations are
    multiplied by the weights.
    """

    def __init__(self, layer: LoraLayer, names: Sequence[str], *, as_modules: bool) -> None:
        super().__init__()
        self._layer: tuple[Any] = (layer,)  # not a module of this one
        self._columns = [(column, name) for column, name in enumerate(names) if name in layer.r]
        self._as_modules = as_modules

    def forward(self, x: Tensor, weights: RowWeights) -> Tensor:
        (layer,) = self._layer
        result = layer.get_base_layer()(x)
        added = self._add_modules(x, weights) if self._as_modules else self._add(x, weights)
        return result + added.to(result.dtype)

    def _add(self, x: Tensor, weights: RowWeights) -> Tensor:
        (layer,) = self._layer
        base = layer.get_base_layer()
        down = torch.cat([layer.lora_A[name].weight for _, name in self._columns])
        up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for _, name in self._columns], dim=1)
        w = torch.cat([weights[:, c : c + 1].expand(-1, layer.r[name]) for c, name in self._columns], dim=1)
        x = x.to(down.dtype)
        if down.ndim == 4:
            inner = functional.conv2d(x, down, None, base.stride, base.padding)
            return functional.conv2d(_times(inner, w[..., None, None]), up)
        inner = functional.linear(x, down)
        return functional.linear(_times(inner, w.view(len(w), *[1] * (x.ndim - 2), -1)), up)

    def _add_modules(self, x: Tensor, weights: RowWeights) -> Tensor:
        (layer,) = self._layer
        outputs = []
        for column, name in self._columns:
            down, up = layer.lora_A[name], layer.lora_B[name]
            inner = down(x.to(down.weight.dtype))
            w = weights[:, column].view(-1, *[1] * (inner.ndim - 1))
            outputs.append(up(_times(inner, w)) * layer.scaling[name])
        return reduce(torch.add, outputs)


def _times(inner: Tensor, weights: Tensor) -> Tensor:
    return (inner * weights).to(inner.dtype)  # in the precision of the weights: 1/3 in bfloat16 is .334
