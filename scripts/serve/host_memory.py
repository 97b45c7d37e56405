"""Memory that the process has freed, and that its allocator keeps."""

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """glibc's function, or None where the C library has none."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function


def release_free_memory() -> None:
    """Return freed memory to the system.

    glibc returns by itself only what lies at the end of its heaps. Tensors of many sizes that come and go leave free
    memory between those that stay, so that a server under load would grow for hours.
    """
    function = _malloc_trim()
    if function is not None:
        function(0)
