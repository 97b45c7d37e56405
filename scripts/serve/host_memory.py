"""Memory that nothing uses any more, and that the process holds: in cycles of objects, and in its allocator."""

import ctypes
import gc
import sys
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """glibc's function, or None where the C library has none."""
    try:
        function = ctypes.CDLL(None).malloc_trim if sys.platform.startswith("linux") else None
    except AttributeError:
        return None
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function


def keep_what_is_loaded() -> None:
    """Leave the objects there are, which stay, out of all collections of garbage.

    Python collects the oldest garbage only when the new objects are a quarter of the old ones. Beside those of torch
    and its libraries a server would have to serve for hours until then.
    """
    gc.collect()
    gc.freeze()


def release_free_memory() -> None:
    """Collect garbage, and return freed memory to the system.

    glibc returns by itself only what lies at the end of its heaps. Tensors of many sizes that come and go leave free
    memory between those that stay, so that a server under load would grow for hours.
    """
    gc.collect()
    function = _malloc_trim()
    if function is not None:
        function(0)
