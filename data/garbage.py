"""Python's collection of reference cycles, in programs that import large libraries.

What torch, diffusers and their dependencies consist of lives until the end. While they are imported, the collector
visits these objects again and again, and once more when the program ends, which takes seconds of every command.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no cycles meanwhile, and never those objects that exist afterwards, for they are there to stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def end_without_collection() -> None:
    """Let this program end without a last search for cycles; the system takes back its memory anyway."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
