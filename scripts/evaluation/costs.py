"""What sampling costs: network evaluations, seconds and memory, and the machine that they were measured on."""

import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn


def machine(device: torch.device) -> str:
    """The device, threads and version of torch, for figures that depend on them."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    file = Path("/proc/cpuinfo")  # of Linux only
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name, *_ = [*names, f"{platform.machine()} CPU"]
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"


@contextmanager
def counted_rows(*networks: nn.Module) -> Iterator[Counter[str]]:
    """Count the `rows` of batches that go through networks, and those of them whose output has a gradient."""
    counts: Counter[str] = Counter(rows=0, with_gradient=0)

    def count(_: nn.Module, arguments: tuple, output: Any) -> None:
        rows = output[0]  # a tensor, or of some networks a list of tensors
        counts["rows"] += len(rows)
        counts["with_gradient"] += len(rows) if rows[0].requires_grad else 0

    with ExitStack() as hooks:
        for network in networks:
            hooks.enter_context(network.register_forward_hook(count))
        yield counts


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Any]:
    """The peak of the memory in use, in MB: of the device, or of the process (Linux only; NaN elsewhere)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 1e6
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    except OSError:
        yield lambda: float("nan")
        return
    yield _high_water_mark


def _high_water_mark() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(status.split("\nVmHWM:")[1].split()[0]) * 1024 / 1e6


def free_memory(device: torch.device) -> float:
    """Bytes that a program could still take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def now(device: torch.device) -> float:
    """Seconds of a clock, once everything that was started on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
