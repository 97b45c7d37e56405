"""One forward for all adapters: each row of a batch has a LoRA of its own, or a mixture of several.

    y_k = W x_k + B_k A_k x_k

The base product is computed once for the whole batch, and the LoRAs of all rows are two batched products beside it,
their factors stacked and picked by row. (LoRA, arXiv:2106.09685; batches of many adapters: Punica, arXiv:2310.18547,
and S-LoRA, arXiv:2311.03285.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional

Rows = Float[Tensor, "rows ..."]


@dataclass(frozen=True)
class MergedAdapters:
    """Adapters merged by weight into one LoRA, Σ w_i B_i A_i, or by factors, λ (Σ w_i B_i / λ) (Σ w_i A_i / λ).

    Attributes:
        weights: (name, w_i) of each.
        factors: average A and B separately; λ is the sum of the weights.
    """

    weights: tuple[tuple[str, float], ...]
    factors: bool = False


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which LoRA each row of a batch has: none for the first rows, for the others one of three.

    The tensors may be longer than the batch; what is left over says nothing.

    Attributes:
        base: how many rows at the front have none.
        experts: one adapter a row, by place; the place after the last stands for none.
        up: c_k, for Σ_i c_ki s_i B_i A_i a row, or with `down`, d_k, for s (Σ_i c_ki B_i) (Σ_i d_ki A_i).
        used: the places that columns of `up` and `down` stand for, by default all.
        merged: the rows after `base` go through the weights of the last `BatchedAdapters.merge`.
    """

    base: int
    experts: Int[Tensor, " rows"] | None = None
    up: Float[Tensor, "rows adapters"] | None = None
    down: Float[Tensor, "rows adapters"] | None = None
    used: Int[Tensor, " used"] | None = None
    merged: bool = False


class LoRAStack(nn.Module):
    """The LoRAs of one layer, stacked: ranks padded with zeros, scales multiplied into B, one of zeros last.

    A layer that an adapter does not touch has zeros for it. A DoRA (arXiv:2402.09353) multiplies each output channel
    by m / ‖W + s B A‖ as well, a number known once it is loaded.

    Buffers, not saved with the model, moved and cast with it:
        down: (adapters + 1, r, in); of a convolution (adapters + 1, r k k, in), each kernel turned by 180°.
        up: (adapters + 1, out, r).
        gain: (adapters + 1, out), where one of the adapters is a DoRA; and the layer's bias.
        merged: like the layer's weight, once adapters were merged.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None
    bias: Tensor | None
    merged: Tensor | None

    def __init__(self, layer: LoraLayer, names: Sequence[str]) -> None:
        super().__init__()
        self._beside = (layer.get_base_layer(),)  # not a module of this one
        weight = self.base.weight.detach()
        own = [(place, name) for place, name in enumerate(names) if name in layer.lora_A]
        rank = max(layer.r[name] for _, name in own)
        down = weight.new_zeros(len(names) + 1, rank, *weight.shape[1:], dtype=torch.float32)
        up = weight.new_zeros(len(names) + 1, len(weight), rank, dtype=torch.float32)
        gain = weight.new_ones(len(names) + 1, len(weight), dtype=torch.float32)
        for place, name in own:
            down[place, : layer.r[name]] = layer.lora_A[name].weight.detach()
            up[place, :, : layer.r[name]] = layer.scaling[name] * layer.lora_B[name].weight.detach().flatten(1)
            if layer.use_dora.get(name, False):
                norm = (weight.float().flatten(1) + up[place] @ down[place].flatten(1)).norm(dim=1)
                gain[place] = layer.lora_magnitude_vector[name].weight.detach().flatten() / norm
                up[place] *= gain[place, :, None]
        self.kernel = tuple(weight.shape[2:])
        if self.kernel:
            down = down.flip(-1, -2).permute(0, 1, 3, 4, 2).flatten(1, 3)
        dora = any(layer.use_dora.get(name, False) for _, name in own)
        self.register_buffer("down", down.to(weight.dtype).contiguous(), persistent=False)
        self.register_buffer("up", up.to(weight.dtype), persistent=False)
        self.register_buffer("gain", gain.to(weight.dtype) if dora else None, persistent=False)
        bias = self.base.bias.detach().clone() if dora and self.base.bias is not None else None
        self.register_buffer("bias", bias, persistent=False)  # the layer's own may be offloaded
        self.register_buffer("merged", None, persistent=False)

    @property
    def base(self) -> nn.Module:
        """The layer without LoRAs."""
        return self._beside[0]

    def forward(self, x: Rows, route: Route) -> Rows:
        """The layer's output for a batch."""
        if route.merged:
            return self._through_merged(x, route.base)
        y = self.base(x)
        count = len(x) - route.base
        if not count:
            return y
        x, rows = x[route.base :], y[route.base :]
        down, up = self._factors(route, count)
        if self.gain is not None and route.experts is not None:
            self._scale(rows, self.gain[route.experts[:count]])
        if self.kernel:
            h = self._convolve(down.expand(count, -1, -1), x)
            _add_product(rows, rows.shape[1:2], up.expand(count, -1, -1), h.flatten(2))
        else:
            h = torch.bmm(x.reshape(count, -1, x.shape[-1]), down.expand(count, -1, -1).mT)
            _add_product(rows, (h.shape[1],), h, up.expand(count, -1, -1).mT)
        return y

    def _factors(self, route: Route, count: int) -> tuple[Tensor, Tensor]:
        """A_k and B_k, one a row, or one for all."""
        if route.experts is not None:
            return self.down[route.experts[:count]], self.up[route.experts[:count]]
        assert route.up is not None
        c = route.up[:count].to(self.up)
        down, up = (f[:-1] if route.used is None else f[route.used] for f in (self.down, self.up))
        if route.down is None:
            scaled = (c[:, :, None, None] * up).transpose(1, 2).flatten(2)
            return down.flatten(0, 1)[None], scaled
        return torch.tensordot(route.down[:count].to(down), down, 1), torch.tensordot(c, up, 1)

    def _scale(self, rows: Rows, gain: Float[Tensor, "rows out"]) -> None:
        """A DoRA's factor, on all but the bias."""
        channels = (-1, 1, 1) if self.kernel else (-1,)
        gain = gain.reshape(len(rows), *[1] * (rows.ndim - 1 - len(channels)), *gain.shape[1:], *channels[1:])
        bias = 0 if self.bias is None else self.bias.reshape(channels)
        rows.sub_(bias).mul_(gain).add_(bias)

    def _convolve(self, down: Tensor, x: Rows) -> Float[Tensor, "rows r h w"]:
        """The convolution with A_k: every tap's product at once, summed where the taps meet.

        A convolution of stride 1 is the transpose of folding; a larger stride keeps every so many of its outputs.
        """
        taps = torch.bmm(down, x.flatten(2))
        padding = [k - 1 - p for k, p in zip(self.kernel, self.base.padding, strict=True)]
        size = [n + 2 * p - k + 1 for n, k, p in zip(x.shape[2:], self.kernel, self.base.padding, strict=True)]
        h = functional.fold(taps, size, self.kernel, padding=padding)
        return h[..., :: self.base.stride[0], :: self.base.stride[1]]

    def _through_merged(self, x: Rows, first: int) -> Rows:
        y = _product(self.base, self.merged, x[first:])
        return torch.cat([self.base(x[:first]), y]) if first else y

    def merge(self, up: Float[Tensor, " adapters"], down: Float[Tensor, " adapters"] | None) -> None:
        """Keep W + Σ_i c_i s_i B_i A_i, or with `down` W + s (Σ_i c_i B_i) (Σ_i d_i A_i)."""
        route = Route(base=0, up=up[None], down=None if down is None else down[None])
        A, B = (factor[0] for factor in self._factors(route, 1))
        if self.kernel:
            A = A.unflatten(0, (-1, *self.kernel)).flip(1, 2).permute(0, 3, 1, 2).flatten(1)
        if self.merged is None:
            self.merged = torch.empty_like(self.base.weight)
        self.merged.copy_(torch.addmm(self.base.weight.flatten(1), B, A).view_as(self.base.weight))


def _add_product(rows: Tensor, inner: Sequence[int], a: Tensor, b: Tensor) -> None:
    """rows += a b, in one pass where the memory allows it."""
    if rows.is_contiguous():
        rows.view(len(rows), *inner, -1).baddbmm_(a, b)
    else:
        rows.add_(torch.bmm(a, b).view_as(rows))


def _product(base: nn.Module, weight: Tensor | None, x: Tensor) -> Tensor:
    """The layer with another weight."""
    if isinstance(base, nn.Conv2d):
        return functional.conv2d(x, weight, base.bias, base.stride, base.padding)
    return functional.linear(x, weight, base.bias)


class BatchedAdapters:
    """The adapters of a UNet, ready to run together: a stack beside each of peft's LoRA layers.

    Without a route the layers do what they did before. The stacks are copies: adapters changed later are not seen.

    Args:
        unet: with LoRAs on it, by peft.
        names: of the adapters, in the order that places refer to.

    Raises:
        ValueError: naming the adapter and the layer, for kinds of LoRA that have no batched form here.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        self.unet = unet
        self.names = tuple(names)
        self.route: Route | None = None
        self._merged: MergedAdapters | None = None
        self._fixed: dict[str, Route] = {}
        layers = {k: m for k, m in unet.named_modules() if isinstance(m, LoraLayer)}
        for name in names:
            if not any(name in layer.r for layer in layers.values()):
                raise ValueError(f"the UNet has no adapter {name!r}")
            for place, layer in layers.items():
                if name in layer.r:
                    _check_layer(layer, place, name)
        used = [layer for layer in layers.values() if any(name in layer.r for name in names)]
        self._stacks = [_add_stack(layer, self, LoRAStack(layer, names)) for layer in used]

    @contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Run the UNet with these LoRAs on the rows of its batch."""
        self.route = route
        try:
            yield
        finally:
            self.route = None

    def route_of(self, adapters: Sequence[str | MergedAdapters | None], device: torch.device) -> Route:
        """The route of rows with these adapters: those without first, and mixtures of one kind or none.

        Rows that all have one mixture go through merged weights, in float32 or wider; in half precision these would
        lose what the LoRAs change.
        """
        if self._fixed:
            return self._fixed_route(adapters)
        base = next((i for i, adapter in enumerate(adapters) if adapter is not None), len(adapters))
        own = adapters[base:]
        merges = [adapter for adapter in own if isinstance(adapter, MergedAdapters)]
        if not merges:
            places = [len(self.names) if name is None else self.names.index(name) for name in own]
            return Route(base=base, experts=torch.tensor(places, dtype=torch.int64, device=device))
        if len(set(merges)) == 1 and self._can_merge():
            self.merge(merges[0])
            return Route(base=base, merged=True)
        pairs = [self._coefficients(merge) for merge in merges]
        used = torch.stack([c for c, _ in pairs]).any(0).nonzero().flatten()
        used = used if len(used) else torch.tensor([0])
        up, down = (torch.stack(values)[:, used].to(device) for values in zip(*pairs, strict=True))
        return Route(base=base, up=up, down=down if merges[0].factors else None, used=used.to(device))

    def fix(self, rows: int, device: torch.device) -> None:
        """Keep routes of up to so many rows in tensors that stay where they are, as compiled networks want them.

        Then other adapters or mixtures are other values, and nothing is compiled anew, nor any CUDA graph recorded.
        """
        experts = torch.zeros(rows, dtype=torch.int64, device=device)
        up, down = (torch.zeros(rows, len(self.names), device=device) for _ in range(2))
        self._fixed = {
            "experts": Route(base=0, experts=experts),
            "soup": Route(base=0, up=up),
            "factors": Route(base=0, up=up, down=down),
        }

    def _fixed_route(self, adapters: Sequence[str | MergedAdapters | None]) -> Route:
        merges = [adapter for adapter in adapters if isinstance(adapter, MergedAdapters)]
        kind = ("factors" if merges[0].factors else "soup") if merges else "experts"
        tensors = [v for v in (self._fixed[kind].experts, self._fixed[kind].up) if v is not None]
        if len(adapters) > len(tensors[0]):
            self.fix(len(adapters), tensors[0].device)
        route = self._fixed[kind]
        if route.experts is not None:
            places = [len(self.names) if name is None else self.names.index(name) for name in adapters]
            route.experts[: len(places)].copy_(torch.tensor(places))
        nothing = MergedAdapters(())
        pairs = [self._coefficients(m if isinstance(m, MergedAdapters) else nothing) for m in adapters]
        for tensor, values in ((route.up, [c for c, _ in pairs]), (route.down, [d for _, d in pairs])):
            if tensor is not None:
                tensor[: len(values)].copy_(torch.stack(values))
        return route

    def merge(self, merge: MergedAdapters) -> None:
        """Keep the weights of one mixture in every layer, until another is merged or they are released."""
        if merge == self._merged:
            return
        self._merged = None
        up, down = self._coefficients(merge)
        for stack in self._stacks:
            stack.merge(up, down if merge.factors else None)
        self._merged = merge

    def release(self) -> None:
        """Give back the memory of merged weights."""
        self._merged = None
        for stack in self._stacks:
            stack.merged = None

    def _can_merge(self) -> bool:
        weights = [stack.base.weight for stack in self._stacks]
        return all(weight.dtype.itemsize >= 4 and not weight.is_meta for weight in weights)  # meta: offloaded

    def _coefficients(self, merge: MergedAdapters) -> tuple[Tensor, Tensor]:
        """c and d of a mixture: for factors c = w and d = w / λ, whose product is λ (w / λ) (w / λ)."""
        weights = dict(merge.weights)
        c = torch.tensor([weights.get(name, 0.0) for name in self.names], dtype=torch.float64)
        strength = c.sum()
        return c, c / strength if strength else torch.zeros_like(c)


class _Routed:
    """A LoRA layer of peft that takes a route where there is one; a class, so that copies of a model are whole."""

    routers: list[BatchedAdapters]
    stacks: nn.ModuleList

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for router, stack in zip(self.routers, self.stacks, strict=True):
            if router.route is not None:
                return stack(x, router.route)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class RoutedLinear(_Routed, Linear): ...


class RoutedConv2d(_Routed, Conv2d): ...


def _add_stack(layer: LoraLayer, router: BatchedAdapters, stack: LoRAStack) -> LoRAStack:
    if not isinstance(layer, _Routed):
        layer.__class__ = RoutedConv2d if isinstance(layer, Conv2d) else RoutedLinear
        layer.routers, layer.stacks = [], nn.ModuleList()
    layer.routers.append(router)
    layer.stacks.append(stack)
    return stack


def _check_layer(layer: LoraLayer, place: str, name: str) -> None:
    """See that an adapter of a layer has a batched form."""
    variant = layer.lora_variant.get(name)
    base = layer.get_base_layer()
    if type(layer) not in (Linear, Conv2d, RoutedLinear, RoutedConv2d):
        why = f"is a {type(layer).__name__} of peft"
    elif variant is not None and not isinstance(variant, DoraLinearVariant | DoraConv2dVariant):
        why = f"is a {type(variant).__name__.removesuffix('Variant')}"
    elif layer.lora_bias.get(name, False):
        why = "has a bias"
    elif isinstance(base, nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros" or base.dilation != (1, 1)):
        why = "is of a convolution with groups, dilation or padding other than zeros"
    else:
        return
    raise ValueError(f"adapter {name!r}: the LoRA of {place} {why}, which cannot be batched; use forwards='separate'")
