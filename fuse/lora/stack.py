"""The LoRAs of one layer, stacked, and the layer's forward for a batch whose rows have different ones.

    y_k = W x_k + B_k A_k x_k

The base product is computed once for the whole batch, and the LoRAs of all rows are two batched products beside it,
their factors picked by row. (LoRA, arXiv:2106.09685; batches of many adapters: Punica, arXiv:2310.18547, and S-LoRA,
arXiv:2311.03285.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

Activations = Float[Tensor, "rows ..."]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which LoRA each row of a batch has: none for the first rows, for the others one of three.

    The tensors may be longer than the batch; what is left over is not read.

    Attributes:
        base: how many rows at the front have none.
        experts: the index of one adapter a row; the index after the last stands for none.
        up: c_k, for Σ_i c_ki s_i B_i A_i a row, or with `down`, d_k, for s (Σ_i c_ki B_i) (Σ_i d_ki A_i).
        used: the adapters' indices that columns of `up` and `down` stand for, by default all.
        merged: the rows after `base` go through the weights merged last.
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
        adapted = [(index, name) for index, name in enumerate(names) if name in layer.lora_A]
        rank = max(layer.r[name] for _, name in adapted)
        down = weight.new_zeros(len(names) + 1, rank, *weight.shape[1:], dtype=torch.float32)
        up = weight.new_zeros(len(names) + 1, len(weight), rank, dtype=torch.float32)
        gain = weight.new_ones(len(names) + 1, len(weight), dtype=torch.float32)
        for index, name in adapted:
            down[index, : layer.r[name]] = layer.lora_A[name].weight.detach()
            up[index, :, : layer.r[name]] = layer.scaling[name] * layer.lora_B[name].weight.detach().flatten(1)
            if layer.use_dora.get(name, False):
                norm = (weight.float().flatten(1) + up[index] @ down[index].flatten(1)).norm(dim=1)
                gain[index] = layer.lora_magnitude_vector[name].weight.detach().flatten() / norm
                up[index] *= gain[index, :, None]
        self.kernel = tuple(weight.shape[2:])
        if self.kernel:
            down = down.flip(-1, -2).permute(0, 1, 3, 4, 2).flatten(1, 3)
        dora = any(layer.use_dora.get(name, False) for _, name in adapted)
        self.register_buffer("down", down.to(weight.dtype).contiguous(), persistent=False)
        self.register_buffer("up", up.to(weight.dtype), persistent=False)
        self.register_buffer("gain", gain.to(weight.dtype) if dora else None, persistent=False)
        bias = self.base.bias.detach().clone() if dora and self.base.bias is not None else None
        self.register_buffer("bias", bias, persistent=False)  # that of the layer may be offloaded
        self.register_buffer("merged", None, persistent=False)

    @property
    def base(self) -> Any:
        """The layer without LoRAs."""
        return self._beside[0]

    def forward(self, x: Activations, route: Route) -> Activations:
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

    def _scale(self, rows: Activations, gain: Float[Tensor, "rows out"]) -> None:
        """A DoRA's factor, on all but the bias."""
        bias = rows.new_zeros(()) if self.bias is None else self.bias
        if self.kernel:
            gain, bias = gain[..., None, None], bias[..., None, None]
        else:
            gain = gain.view(len(rows), *[1] * (rows.ndim - 2), -1)
        rows.sub_(bias).mul_(gain).add_(bias)

    def _convolve(self, down: Tensor, x: Activations) -> Float[Tensor, "rows r h w"]:
        """The convolution with A_k: every tap's product at once, summed where the taps meet.

        A convolution of stride 1 is the transpose of folding; a larger stride keeps every so many of its outputs.
        """
        taps = torch.bmm(down, x.flatten(2))
        padding = tuple(k - 1 - p for k, p in zip(self.kernel, self.base.padding, strict=True))
        size = tuple(n + 2 * p - k + 1 for n, k, p in zip(x.shape[2:], self.kernel, self.base.padding, strict=True))
        h = functional.fold(taps, size, self.kernel, padding=padding)
        return h[..., :: self.base.stride[0], :: self.base.stride[1]]

    def _through_merged(self, x: Activations, first: int) -> Activations:
        base, adapted, weight = self.base, x[first:], cast(Tensor, self.merged)
        y = (
            functional.conv2d(adapted, weight, base.bias, base.stride, base.padding)
            if self.kernel
            else functional.linear(adapted, weight, base.bias)
        )
        return torch.cat([base(x[:first]), y]) if first else y

    def merge(self, route: Route) -> None:
        """Keep W + B A of a mixture's route of one row."""
        A, B = (factor[0] for factor in self._factors(route, 1))
        if self.kernel:
            A = A.unflatten(0, (-1, *self.kernel)).flip(1, 2).permute(0, 3, 1, 2).flatten(1)
        if self.merged is None:
            self.merged = torch.empty_like(self.base.weight, memory_format=torch.contiguous_format)
        torch.addmm(self.base.weight.detach().flatten(1), B, A, out=self.merged.flatten(1))


def _add_product(rows: Tensor, inner: Sequence[int], a: Tensor, b: Tensor) -> None:
    """rows += a b, in one pass where the memory allows it."""
    if rows.is_contiguous():
        rows.view(len(rows), *inner, -1).baddbmm_(a, b)
    else:
        rows.add_(torch.bmm(a, b).view_as(rows))
