"""One forward for all adapters of a network: each row of a batch has its LoRA, or a mixture of several."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
from torch import Tensor, nn

from stepfuse.data.devices import to_device
from stepfuse.fuse.lora.layers import check_exist, is_among
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.fuse.lora.routes import FixedRoutes, RecentRoutes
from stepfuse.fuse.lora.stack import LoRAStack, Route

S = TypeVar("S", bound=nn.Module)


class BatchedAdapters:
    """The adapters of a network, ready to run together: a stack beside each of peft's LoRA layers.

    Without a route the layers do what they did before. The stacks are copies: adapters changed later are not seen.

    Args:
        network: with LoRAs on it, by peft.
        names: of the adapters, in the order that indices refer to.
        unbatched: names of layers that do not keep the rows of a batch apart (`Backbone.unbatched`).

    Raises:
        ValueError: naming the adapter and the layer, for kinds of LoRA that have no batched form here.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], unbatched: Collection[str] = ()) -> None:
        self.network = network
        self.names = tuple(names)
        self.route: Route | None = None
        self._merged: Network | None = None
        self._fixed: FixedRoutes | None = None  # a module of the network, which moves it
        self._recent: RecentRoutes[Route] = RecentRoutes()
        layers = {k: m for k, m in network.named_modules() if isinstance(m, LoraLayer)}
        check_exist(layers.values(), names)
        for path, layer in layers.items():
            for name in names:
                if name in layer.r:
                    check_batched_layer(layer, path, name, unbatched)
        used = [layer for layer in layers.values() if any(name in layer.r for name in names)]
        self._doras = {name for name in names for layer in used if layer.use_dora.get(name, False)}
        self._stacks = [add_stack(layer, self, LoRAStack(layer, names)) for layer in used]

    @property
    def are_mixed(self) -> bool:
        """Whether every adapter can be one of a mixture, which a DoRA cannot."""
        return not self._doras

    @contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Run the network with these LoRAs on the rows of its batch."""
        self.route = route
        try:
            yield
        finally:
            self.route = None

    def route_of(self, networks: Sequence[Network], device: torch.device) -> Route:
        """The route of rows with these networks: those of the base first, the others merged alike, or none merged.

        Where all of the others are one cacheable network they go through merged weights. Not in half precision, which
        would lose what the LoRAs change, nor where weights are offloaded between forwards.

        Raises:
            ValueError: for a merged DoRA, which is not linear in its weight.
        """
        if self._fixed is not None:
            return self._fixed_route(tuple(networks), device)
        base = next((i for i, network in enumerate(networks) if network != BASE), len(networks))
        adapted = tuple(networks[base:])
        merge = _merge_of(adapted)
        if merge and adapted[0].cacheable and len(set(adapted)) == 1 and self._can_merge(device):
            self._merge(adapted[0], device)
            return Route(base=base, merged=True)
        make = self._mixture_route if merge else self._expert_route
        route = self._recent.get((adapted, device, self._stacks[0].up.dtype), lambda: make(adapted, device))
        return replace(route, base=base)

    def _expert_route(self, networks: Sequence[Network], device: torch.device) -> Route:
        return Route(base=0, experts=to_device(self._indices(networks), device))

    def _mixture_route(self, merged: Sequence[Network], device: torch.device) -> Route:
        up, down = self._coefficients(merged)
        used = up.any(0).nonzero().flatten()
        used = used if len(used) else torch.tensor([0])
        up, down = (to_device(values[:, used], device, self._stacks[0].up.dtype) for values in (up, down))
        down_or_none = down if _merge_of(merged) == "factors" else None
        return Route(base=0, up=up, down=down_or_none, used=to_device(used, device))

    def fix(self, rows: int, device: torch.device) -> None:
        """Keep routes of up to `rows` rows in the same tensors, so that a compiled network is not compiled again.

        Other adapters or mixtures are then other values, and no CUDA graph is recorded again.
        """
        self._fix(rows, device)

    def _fix(self, rows: int, device: torch.device) -> FixedRoutes:
        first = self._stacks[0]
        self._fixed = FixedRoutes(rows, len(self.names), device=device, dtype=first.up.dtype)
        first.add_module("fixed_routes", self._fixed)
        return self._fixed

    @property
    def fixed(self) -> bool:
        """Whether routes are kept in the same tensors."""
        return self._fixed is not None

    def _fixed_route(self, networks: tuple[Network, ...], device: torch.device) -> Route:
        fixed = self._fixed
        assert fixed is not None
        # An offloaded network comes to the device after its route, and brings along what is not there yet.
        if len(networks) > fixed.rows or fixed.experts.device != device:
            fixed = self._fix(max(len(networks), fixed.rows), device)
        merge = _merge_of(networks)
        if not merge:
            fixed.write(["experts"], networks, lambda: [self._indices(networks)])
            return Route(base=0, experts=fixed.experts)
        fixed.write(["up", "down"], networks, lambda: self._coefficients(networks))
        return Route(base=0, up=fixed.up, down=fixed.down if merge == "factors" else None)

    def release(self) -> None:
        """Give back the memory of merged weights."""
        self._merged = None
        for stack in self._stacks:
            stack.merged = None

    def _merge(self, network: Network, device: torch.device) -> None:
        if network == self._merged:
            return
        self._merged = None
        route = self._mixture_route([network], device)
        for stack in self._stacks:
            stack.merge(route)
        self._merged = network

    def _can_merge(self, device: torch.device) -> bool:
        weights = [stack.base.weight for stack in self._stacks]
        return all(weight.dtype.itemsize >= 4 and weight.device == device for weight in weights)

    def _indices(self, networks: Sequence[Network]) -> Tensor:
        """The index of each network's adapter; that of the base is the number of adapters."""
        order = (*self.names, None)
        return torch.tensor([order.index(network.adapter) for network in networks], dtype=torch.int64)

    def _coefficients(self, merged: Sequence[Network]) -> tuple[Tensor, Tensor]:
        """c and d of merged networks: for factors c = w and d = w / λ, whose product is λ (w / λ) (w / λ)."""
        for name in {name for network in merged for name, weight in network.weights if weight}:
            if name in self._doras:
                raise ValueError(f"adapter {name!r} is a DoRA, which cannot be merged by weight; use the rule product")
        weights = [dict(network.weights) for network in merged]
        c = torch.tensor([[w.get(name, 0.0) for name in self.names] for w in weights], dtype=torch.float64)
        strength = c.sum(1, keepdim=True)
        return c, torch.where(strength == 0, 0, c / strength)


def _merge_of(networks: Sequence[Network]) -> str:
    """How the networks of one forward are merged, leaving out the base."""
    return next((network.merge for network in networks if network.merge), "")


class HasRoute(Protocol):
    """What routes the rows of a batch, where its route is not None."""

    route: Any


class _Routed:
    """A LoRA layer of peft that takes a route where there is one; a class, so that copies of a model are whole."""

    routers: list[HasRoute]
    stacks: nn.ModuleList

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for router, stack in zip(self.routers, self.stacks, strict=True):
            if router.route is not None:
                return stack(x, router.route)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class RoutedLinear(_Routed, Linear): ...


class RoutedConv2d(_Routed, Conv2d): ...


def add_stack(layer: LoraLayer, router: HasRoute, stack: S) -> S:
    """Let a layer run this stack where the router has a route, in place of its own forward."""
    if not isinstance(layer, _Routed):
        layer.__class__ = RoutedConv2d if isinstance(layer, Conv2d) else RoutedLinear
        layer.routers, layer.stacks = [], nn.ModuleList()
    layer.routers.append(router)
    layer.stacks.append(stack)
    return stack


def check_batched_layer(
    layer: LoraLayer, path: str, name: str, unbatched: Collection[str], remedy: str = "use forwards='separate'"
) -> None:
    """Raise ValueError, which ends with the remedy, for a LoRA that has no batched form."""
    variant = layer.lora_variant.get(name)
    base = layer.get_base_layer()
    if type(layer) not in (Linear, Conv2d, RoutedLinear, RoutedConv2d):
        why = f"is a {type(layer).__name__} of peft"
    elif is_among(path, unbatched):
        why = "is of a layer that mixes the images of a batch"
    elif variant is not None and not isinstance(variant, DoraLinearVariant | DoraConv2dVariant):
        why = f"is a {type(variant).__name__.removesuffix('Variant')}"
    elif layer.lora_bias.get(name, False):
        why = "has a bias"
    elif isinstance(base, nn.Conv2d) and (
        base.groups != 1 or base.dilation != (1, 1) or base.padding_mode != "zeros" or isinstance(base.padding, str)
    ):
        why = "is of a convolution with groups, dilation or padding other than zeros"
    else:
        return
    raise ValueError(f"adapter {name!r}: the LoRA of {path} {why}, which cannot be batched; {remedy}")
