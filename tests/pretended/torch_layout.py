"""Parts of torch's C++ that a CPU build leaves empty, filled so that tensors may say cuda.

torch offers no way to register a device under the name of CUDA without CUDA, so this writes into the memory of its
libraries, for which their layout must be known: `unavailable` says whether it is.
"""

import ctypes
import functools
import sys
from pathlib import Path

import torch

KNOWN = ("2.13",)  # versions whose registry of guards and whose CUDAHooksInterface.h were read
LIBRARIES = Path(torch.__file__).parent / "lib"
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
HOOKS = "_ZN2at6detail12getCUDAHooksEv"  # at::detail::getCUDAHooks()
DEVICE_TYPES = 21  # c10::COMPILE_TIME_MAX_DEVICE_TYPES
CUDA_TYPE = 1  # c10::DeviceType::CUDA
IS_BUILT, HAS_PRIMARY_CONTEXT = 2, 4  # virtual functions of the hooks, after two destructors
HOOKS_SIZE = 128  # pointers, more than its virtual functions are


@functools.cache
def unavailable() -> str | None:
    """Why the device cannot be pretended here, or None."""
    version = ".".join(torch.__version__.split(".")[:2])
    if sys.platform != "linux":
        return f"the pretended device needs Linux, and this is {sys.platform}"
    if torch.version.cuda or torch.version.hip or torch.backends.cuda.is_built():
        return f"the pretended device needs a CPU build of torch, and this is {torch.__version__}"
    if version not in KNOWN:
        return f"the pretended device knows the layout of torch {', '.join(KNOWN)}, and this is {torch.__version__}"
    try:
        _guards(), _hooks()
    except (OSError, ValueError, AttributeError) as error:
        return f"the pretended device does not find its place in torch {torch.__version__}: {error}"
    if _guards()[CUDA_TYPE]:
        return "the pretended device would take the place of another under the name of CUDA"
    return None


def _guards() -> ctypes.Array:
    """The table of device guards by type, into which a real CUDA build writes its own when it is loaded."""
    return (ctypes.c_void_p * DEVICE_TYPES).in_dll(ctypes.CDLL(str(LIBRARIES / "libc10.so")), GUARDS)


def _hooks() -> ctypes._Pointer:
    """The object through which the CPU's library asks that of CUDA; its first word points to its functions."""
    find = getattr(ctypes.CDLL(str(LIBRARIES / "libtorch_cpu.so")), HOOKS)
    find.restype = ctypes.c_void_p
    return ctypes.cast(find(), ctypes.POINTER(ctypes.c_void_p))


def pretend_guard() -> None:
    """A guard of CUDA devices that does nothing, of one device.

    `_ensureCUDADeviceGuardSet`, made for fake tensors, puts one (NoOpDeviceGuardImpl) in the place of a guard that has
    no devices, and without any it does nothing: so it is lent one all of whose functions return 0.
    """
    guards = _guards()
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    lent = ctypes.c_void_p(ctypes.addressof(functions))
    guards[CUDA_TYPE] = ctypes.addressof(lent)
    torch._C._ensureCUDADeviceGuardSet()
    if guards[CUDA_TYPE] == ctypes.addressof(lent):
        guards[CUDA_TYPE] = None
        raise RuntimeError(f"torch {torch.__version__} did not replace a device guard without devices")
    _keep(zero, functions, lent)


def pretend_hooks() -> None:
    """Let CUDA's hooks say that it was built and has a context: autograd asks them before it runs backward.

    The object gets a copy of its table of functions, in which these two are a function of Python's that returns 1.
    """
    hooks = _hooks()
    functions = (ctypes.c_void_p * HOOKS_SIZE)(*(ctypes.c_void_p * HOOKS_SIZE).from_address(hooks[0]))
    for slot in (IS_BUILT, HAS_PRIMARY_CONTEXT):
        functions[slot] = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(functions)
    _keep(functions)


def _keep(*objects: object) -> None:
    """Never free them: threads of torch outlive the interpreter."""
    for kept in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
