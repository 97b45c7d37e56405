"""What the host waits for on a GPU, counted by kind and by the line of the project that asked.

Work is queued on a GPU, and the host goes on; it waits when it needs a number, or gives one from memory that it may
change. A wait is:

- `scalar`: a number is read: `.item()`, `bool(x)`, `x.tolist()` of no dimensions, `allclose`, `equal`, and operators
  that read one inside (`masked_fill` with a value on the device, `multinomial`, errors of `torch.linalg`);
- `shape`: a shape that depends on numbers: `nonzero`, a mask as index, `unique`, `repeat_interleave` by a tensor;
- `D2H`: a copy to the host, unless it is non_blocking, which makes its target in pinned memory;
- `H2D`: a copy to the device that is blocking or from pageable memory, and an index on the host;
- `synchronize`: of the device, a stream or an event, and `empty_cache`, which frees memory and so waits.

Copies from pinned memory with `non_blocking=True` are no waits.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.pretended.device_rules import INDEXED

ROOT = str(Path(__file__).parents[2])
READS_INSIDE = {  # times that an operator's implementation for CUDA reads a number
    "aten::masked_fill": 1,
    "aten::masked_fill_": 1,
    "aten::multinomial": 2,
    "aten::_linalg_check_errors": 1,
}


@dataclass
class Waits:
    """Counts of the thread that asked for them; autograd's threads work for it, which waits for them meanwhile.

    Attributes:
        kinds: waits by kind.
        lines: waits by (kind, operator, line of the project).
        elsewhere: the `lines` of other threads, such as that which scores images.
        ops: calls of operators of the first thread by name.
    """

    thread: int = field(default_factory=threading.get_ident)
    kinds: Counter[str] = field(default_factory=Counter)
    lines: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    elsewhere: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def is_ours(self) -> bool:
        started_by_python = not isinstance(threading.current_thread(), threading._DummyThread)
        return self.thread == threading.get_ident() or not started_by_python

    def add(self, kind: str, what: str, times: int = 1) -> None:
        if self.is_ours():
            self.kinds[kind] += times
            self.lines[kind, what, where()] += times
        else:
            self.elsewhere[kind, what, where()] += times


WATCHING: list[Waits] = []


@contextmanager
def counted() -> Iterator[Waits]:
    """Count the waits of what is done within."""
    waits = Waits()
    WATCHING.append(waits)
    try:
        yield waits
    finally:
        WATCHING.remove(waits)


def wait(kind: str, what: str, times: int = 1) -> None:
    """Count a wait."""
    for waits in WATCHING:
        waits.add(kind, what, times)


def where() -> str:
    """The innermost line of the project, or else the innermost of another library than torch."""
    frame, outside = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "site-packages" not in file and "/tests/" not in file:
            return f"{file.removeprefix(ROOT + '/')}:{frame.f_lineno}"
        if not outside and "/torch/" not in file and "/tests/pretended/" not in file:
            outside = f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return f"({outside})" if outside else "(backward)"


def count(func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Count what the host waits for in a call of an operator on tensors of the device."""
    if not WATCHING:
        return
    for waits in WATCHING:
        waits.ops[func._schema.name] += waits.is_ours()
    for kind, times in (_reads(func, args), _shape(func, args, kwargs), _copies(func, args, kwargs, out)):
        if times:
            wait(kind, str(func), times)


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _reads(func: Any, args: tuple) -> tuple[str, int]:
    name = func._schema.name
    if name in ("aten::masked_fill", "aten::masked_fill_") and not _on_device(args[2]):
        return "scalar", 0
    return "scalar", READS_INSIDE.get(name, int(torch.Tag.data_dependent_output in func.tags))


def _shape(func: Any, args: tuple, kwargs: dict) -> tuple[str, int]:
    if func._schema.name in INDEXED:
        indices = [i for i in args[1] if i is not None]
        masks = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        # One value put through one mask is masked_fill.
        fills = len(args) > 2 and len(indices) == 1 and args[2].numel() == 1 and not _on_device(args[2])
        return "shape", int(masks and _on_device(args[0]) and not fills)
    return "shape", int(torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None)


def _copies(func: Any, args: tuple, kwargs: dict, out: Any) -> tuple[str, int]:
    name = func._schema.name
    if name in INDEXED:
        return "H2D", int(_on_device(args[0])) * sum(i is not None and not _on_device(i) for i in args[1])
    if name == "aten::copy_":
        target, source, free = args[0], args[1], kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    elif name == "aten::_to_copy":
        target, source, free = out, args[0], kwargs.get("non_blocking")
    else:
        return "", 0
    if _on_device(target) == _on_device(source):
        return "", 0
    if _on_device(target):
        return "H2D", int(not (free and is_pinned(source)))
    return "D2H", int(not (free and (name == "aten::_to_copy" or is_pinned(target))))


# Pinned storages by address. A weak reference says whether the storage is still the one that was pinned.
_PINNED: dict[int, StorageWeakRef] = {}


def is_pinned(values: Tensor, *_: Any) -> bool:
    """Whether a tensor on the host lies in pinned memory."""
    if values.device.type != "cpu":
        return False
    known = _PINNED.get(values.untyped_storage().data_ptr())
    return known is not None and not known.expired()


def pin_memory(values: Tensor, *_: Any) -> Tensor:
    """A copy in pinned memory, or the tensor itself if it lies there."""
    if values.device.type != "cpu":
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    if is_pinned(values):
        return values
    for address in [address for address, known in _PINNED.items() if known.expired()]:
        del _PINNED[address]
    copy = values.detach().clone()
    _PINNED[copy.untyped_storage().data_ptr()] = StorageWeakRef(copy.untyped_storage())
    return copy
