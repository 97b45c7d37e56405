"""Routes on the device: those of recent batches, and those in tensors that stay where they are."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from stepfuse.data.devices import to_device

R = TypeVar("R")


class RecentRoutes(Generic[R]):
    """The routes of recent batches, kept on the device: they go there once a run, not once a forward.

    Args:
        size: how many are kept; the one that was used longest ago makes room.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._routes: OrderedDict[Hashable, R] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], R]) -> R:
        """The route of a key, made where it is not among the recent ones."""
        if key in self._routes:
            self._routes.move_to_end(key)
            return self._routes[key]
        with torch.inference_mode(False):  # kept longer than the mode they are first asked for in
            route = self._routes[key] = make()
        if len(self._routes) > self._size:
            self._routes.popitem(last=False)
        return route


class FixedRoutes(nn.Module):
    """Routes of up to `rows` rows in the same tensors, which compiled networks and CUDA graphs read wherever they are.

    Buffers, not saved with the model, moved with it: `experts`, `up` and `down`, see `Route`.

    Args:
        adapters: how many there are.
        dtype: of coefficients.
    """

    experts: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, rows: int, adapters: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        with torch.inference_mode(False):
            self.register_buffer("experts", torch.zeros(rows, dtype=torch.int64, device=device), persistent=False)
            for name in ("up", "down"):
                values = torch.zeros(rows, adapters, device=device, dtype=dtype)
                self.register_buffer(name, values, persistent=False)
        self._written: dict[str, Hashable] = {}

    def write(self, names: Sequence[str], key: Hashable, make: Callable[[], Sequence[Tensor]]) -> None:
        """Write the first rows of these tensors, unless they hold what this key stands for."""
        keys = {name: (key, self.get_buffer(name).dtype) for name in names}
        if all(self._written.get(name) == keys[name] for name in names):
            return
        for name, values in zip(names, make(), strict=True):
            buffer = self.get_buffer(name)
            buffer[: len(values)].copy_(to_device(values, buffer.device, buffer.dtype))
        self._written |= keys
