"""Errors of a failed allocation, in the memory of the host or of a GPU."""

import re

import torch

# Of torch's allocator on the CPU; of CUDA beside the caching allocator, and of its libraries.
_TEXTS = ("not enough memory", "can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a failed allocation: torch raises a plain RuntimeError where one on the CPU fails."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def first_sentence(error: BaseException) -> str:
    """What could not be allocated, without the allocator's statistics after it."""
    text = re.sub(r"^\[enforce fail at [^]]*\] [^.]*\. ", "", " ".join(str(error).split()))
    first = text.split(". ")[0].rstrip(".")
    tried = re.search(r"[Tt]ried to allocate [\d.]+ ?\w+", text)
    return f"{first}: {tried[0]}" if tried and tried[0] not in first else first
