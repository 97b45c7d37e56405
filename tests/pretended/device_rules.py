"""What a GPU refuses: operators on tensors of two devices, by torch's own rules."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor

# Operators that take tensors of several devices, or whose rules `check_devices` has.
FREE = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::_copy_from",
    "aten::_copy_from_and_resize",
    "aten::set_",
    "aten::resize_as_",
    "aten::is_same_size",
    "aten::_has_compatible_shallow_copy_type",
}
INDEXED = {
    "aten::index",
    "aten::_unsafe_index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index_put",
}


class DeviceMix(RuntimeError):
    """What a GPU would refuse."""


@functools.cache
def takes_a_scalar() -> frozenset[str]:
    """Operators without a device check of their own, as native_functions.yaml says.

    They are TensorIterator's, which takes one tensor without dimensions from the CPU.
    """
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    names, last = set(), ""
    for line in map(str.strip, file.read_text().splitlines()):
        if line.startswith("- func:"):
            last = line.removeprefix("- func:").strip().split("(")[0]
        elif line.startswith("device_check: NoCheck"):
            names.add(f"aten::{last}")
    return frozenset(names)


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(position, a.name) for position, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def written(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """What an operator writes to."""
    places = _written(func)
    return [args[i] for i, _ in places if i < len(args)] + [kwargs[name] for _, name in places if name in kwargs]


def tensors_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operator, which are at most lists of them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from (each for each in value if isinstance(each, Tensor))


def check_devices(func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    """Refuse an operator for the devices of its tensors.

    Raises:
        DeviceMix: naming the operator, and device and shape of each tensor.
    """
    name = func._schema.name
    if len({t.device.type for t in tensors}) < 2 or name in FREE or name.startswith("aten::_foreach"):
        return  # operators on lists of tensors fall back to one tensor at a time
    if name == "aten::where":
        allowed = all(t.device.type == "cuda" or t.dim() == 0 for t in tensors)
    elif name in INDEXED:
        allowed = _may_index(*args[:3])
    else:
        allowed = _takes_its_scalar(func, args, kwargs, tensors)
    if not allowed:
        shapes = ", ".join(f"{t.device.type}{tuple(t.shape)}" for t in tensors)
        raise DeviceMix(f"{func}: tensors on two devices ({shapes})")


def _may_index(own: Tensor, indices: list[Tensor | None], values: Tensor | None = None) -> bool:
    """Indices are on the CPU or beside the indexed tensor; values beside it, or a scalar."""
    beside = all(i is None or i.device.type in ("cpu", own.device.type) for i in indices)
    return beside and (values is None or values.device == own.device or values.dim() == 0)


def _takes_its_scalar(func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> bool:
    """One tensor without dimensions may come from the CPU, unless it is the one written to."""
    full = func.name()
    of_cpu = [t for t in tensors if t.device.type == "cpu"]
    one = len(of_cpu) == 1 and of_cpu[0].dim() == 0
    return one and full in takes_a_scalar() and not any(t is of_cpu[0] for t in written(func, args, kwargs))


def with_its_generator(function: Callable) -> Callable:
    """A function that draws numbers, which refuses a generator of another device than the numbers'.

    It stands before torch's, since operators get another object of Python's for the generator.

    Raises:
        DeviceMix: in torch's words.
    """

    @functools.wraps(function)
    def checked(*args: Any, generator: Any = None, **kwargs: Any) -> Any:
        if generator is not None:
            tensor = next((a for a in args if isinstance(a, Tensor)), None)
            device = kwargs.get("device") or (tensor.device if tensor is not None else "cpu")
            kind, given = torch.device(device).type, generator.device.type
            if kind != given:
                raise DeviceMix(f"Expected a '{kind}' device type for generator but found '{given}'")
            kwargs["generator"] = generator
        return function(*args, **kwargs)

    return checked
