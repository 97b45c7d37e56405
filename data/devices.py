"""Tensors between the host and a GPU, without making one wait for the other."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`values.to(device, dtype)`; from the host to a GPU through pinned memory, so that the host does not wait.

    A copy from pageable memory would wait until the GPU has done everything that was queued before it. The first copies
    of a size allocate pinned memory, which takes longer.
    """
    device, dtype = torch.device(device), dtype or values.dtype
    if values.device.type == "cpu" and device.type == "cuda":
        return values.to(dtype).contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device, dtype)


def default_device() -> str:
    """`"cuda"` if PyTorch can use a GPU, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_host(values: Tensor) -> bool:
    """Whether reading the numbers of a tensor makes nobody wait. Others are not read on the way to an image."""
    return values.device.type == "cpu"


def allow_tf32() -> None:
    """Compute products of float32 matrices in TF32 on Ampere and newer GPUs: faster, with 10 bits of mantissa.

    Convolutions are by torch's default.
    """
    torch.backends.cuda.matmul.allow_tf32 = True


def without_autocast(device: torch.device | str) -> AbstractContextManager[None]:
    """Compute in the precision of the tensors, whatever autocast surrounds the code."""
    kind = torch.device(device).type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
