"""A tensor that says cuda:0, with its numbers in the memory of the CPU."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.pretended.device_rules import check_devices, tensors_among, written
from tests.pretended.waits import count

CUDA = torch.device("cuda", 0)


class Pretend(Tensor):
    """A tensor on the pretended device; `wrap` makes one.

    Every operator on it goes through `run`, in every thread and under autograd and autocast, whose rules are those of
    CUDA since the wrapper's device is. `_inner` holds the numbers.
    """

    # Without it torch would also send every call of a function of torch through Python, and keep the subclass in
    # results that are on the CPU.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Tensor:
        """A parameter, since accelerate moves one by type(parameter)(data, requires_grad=…)."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})

    # Tensor's own methods read the memory of the tensor, which a wrapper has none of.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self._inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            new = self.detach().clone().requires_grad_(self.requires_grad)
            # nn.Parameter(Pretend) is a Pretend with this attribute.
            memo[id(self)] = torch.nn.Parameter(new, self.requires_grad) if getattr(self, "_is_param", False) else new
        return memo[id(self)]

    @property
    def data(self) -> Tensor:
        return wrap(self._inner.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # shape and type of the wrapper
        self._inner = value._inner


def wrap(inner: Tensor) -> Tensor:
    """The same numbers, on the device."""
    own = torch.Tensor._make_wrapper_subclass(
        Pretend,
        inner.size(),
        strides=inner.stride(),
        storage_offset=inner.storage_offset(),
        dtype=inner.dtype,
        layout=inner.layout,
        device=CUDA,
        requires_grad=False,
    )
    own._inner = inner
    return own


def on_device(value: Any) -> bool:
    return type(value) is Pretend


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call an operator on the CPU tensors within, by the rules of the device.

    Raises:
        DeviceMix: where a GPU would refuse.
    """
    if torch.is_inference_mode_enabled() and _is_composite(func):
        return func.decompose(*args, **kwargs)  # elsewhere autograd has done so
    tensors = list(tensors_among(args, kwargs))
    check_devices(func, args, kwargs, tensors)
    comes_from_device = any(map(on_device, tensors))
    inner_args = [_changed(value, _inside) for value in args]
    inner_kwargs = {name: _changed(value, _inside) for name, value in kwargs.items()}
    device = kwargs.get("device")
    goes_to_device = comes_from_device if device is None else torch.device(device).type == "cuda"
    if device is not None and goes_to_device:
        inner_kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    out = func(*inner_args, **inner_kwargs)
    result = _in_place(func, written(func, args, kwargs))
    if result is None:
        result = _wrapped(func, args, out) if goes_to_device else out
    count(func, args, kwargs, result)
    return result


def _in_place(func: Any, targets: list[Any]) -> Any:
    """What an operator returns that returns the tensors it wrote to: these themselves. None for others."""
    for target in targets:
        if on_device(target) and target._inner.shape != target.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor, which its wrapper cannot follow")
    returns = func._schema.returns
    if not targets or len(returns) != len(targets) or any(r.alias_info is None for r in returns):
        return None
    return targets[0] if len(targets) == 1 else tuple(targets)


def _wrapped(func: Any, args: tuple, out: Any) -> Any:
    """Results as tensors of the device. A view in inference mode of a tensor from outside it is no inference tensor."""
    is_view = any(r.alias_info is not None for r in func._schema.returns) and not args[0].is_inference()
    leaves = is_view and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if leaves else nullcontext():
        return _changed(out, lambda value: value if on_device(value) else wrap(value))


def _inside(value: Tensor) -> Tensor:
    return value._inner if on_device(value) else value


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """With every tensor changed; arguments and results are at most lists of them. (pytree is many times slower.)"""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_changed(each, change) for each in value) if type(value) in (list, tuple) else value
