"""A CUDA device that is not there: tensors say cuda:0, their numbers lie in the memory of the CPU.

Unlike fake tensors they hold data, so code that looks at numbers runs; unlike a mode the device is there in every
thread. What a GPU would refuse is refused (`device_rules`). What the host would wait for is counted, with the line of
the project that asked (`waits`). Numbers are those of the CPU to the last bit, generators' too.

`install` changes the process for good, so these tests have one of their own. It is not a GPU: nothing is
asynchronous, memory is not limited, streams and graphs do nothing, and kernels are those of the CPU.
"""

import functools
from typing import Any

import torch

from tests.pretended.device_rules import DeviceMix, with_its_generator
from tests.pretended.streams import install_streams
from tests.pretended.tensors import CUDA, Pretend, wrap
from tests.pretended.torch_layout import pretend_guard, pretend_hooks, unavailable
from tests.pretended.waits import Waits, counted, is_pinned, pin_memory, wait

__all__ = ["CUDA", "DeviceMix", "Pretend", "Waits", "counted", "install", "unavailable", "wrap"]

aten = torch.ops.aten
FACTORIES = (  # beside `empty`, from which torch makes zeros, ones, full and random numbers
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "eye",
    "eye.m",
    "randperm",
    "randperm.generator",
    "tril_indices",
    "triu_indices",
)
ANSWERS = {  # functions of torch.cuda that do nothing but to answer
    "_lazy_init": None,
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "get_device_name": "pretended",
    "get_device_capability": (9, 0),
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "memory_allocated": 0,
    "memory_reserved": 0,
    "max_memory_allocated": 0,
    "reset_peak_memory_stats": None,
    "mem_get_info": (80 << 30, 80 << 30),
    "ipc_collect": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
    "set_rng_state_all": None,
}
DRAWING = {
    torch: ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    torch.Tensor: ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "bernoulli", "multinomial"),
}


class PretendGenerator(torch._C.Generator):
    """A generator that says where it is; its numbers are the CPU's."""

    pretended = None

    def __new__(cls, device: torch.device | str = "cpu") -> "PretendGenerator":
        own = torch._C.Generator.__new__(cls, torch.device("cpu"))
        own.pretended = CUDA if torch.device(device).type == "cuda" else torch.device(device)
        return own

    def __init__(self, device: torch.device | str = "cpu") -> None: ...  # __new__ of the base has taken it

    @property
    def device(self) -> torch.device:
        return self.pretended


@functools.cache
def install() -> None:
    """Put the device into this process, before anything asks for one; again without effect.

    Raises:
        RuntimeError: with the reason, where it cannot be pretended.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    pretend_guard()
    pretend_hooks()
    # torch.tensor(…, device="cuda") makes its numbers on the CPU and moves them: let it, as it does for fake tensors,
    # make no tensor of the device before that, for which subclasses are passed over.
    torch._C._set_only_lift_cpu_tensors(True)
    _register_factories()
    _answer_for_cuda()
    # Module.to by exchanging parameters: the other way assigns `.data`, which a wrapper has none of.
    torch.__future__.set_swap_module_params_on_conversion(True)
    for place, names in DRAWING.items():
        for name in names:
            setattr(place, name, with_its_generator(getattr(place, name)))
    torch.Generator = PretendGenerator
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = is_pinned


@functools.cache
def _library() -> torch.library.Library:
    """Implementations of operators for CUDA, of which a CPU build has none; they hold as long as this lives."""
    return torch.library.Library("aten", "IMPL")


def _register_factories() -> None:
    """Operators that make tensors of nothing, which no tensor sends to `Pretend`."""

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return wrap(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        return wrap(torch.empty_strided(size, stride, dtype=dtype))

    def on_cpu(
        operator: Any, *args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **kwargs: Any
    ):
        return wrap(operator(*args, **kwargs, device=torch.device("cpu")))

    _library().impl("empty.memory_format", empty, "CUDA")
    _library().impl("empty_strided", empty_strided, "CUDA")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        _library().impl(name, functools.partial(on_cpu, operator), "CUDA")


def _answer_for_cuda() -> None:
    """What `torch.cuda` and `torch.accelerator` say and do."""
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = lambda *_: wait("synchronize", "torch.cuda.synchronize")
    torch.cuda.empty_cache = lambda: wait("synchronize", "torch.cuda.empty_cache")
    install_streams(Pretend)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    torch.accelerator.synchronize = torch.cuda.synchronize
