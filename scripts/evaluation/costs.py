"""What sampling costs: network evaluations, seconds and memory, and the machine that they were measured on."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch


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
def counted_rows(module: torch.nn.Module) -> Iterator[Any]:
    """Count the images that go through a network: its function evaluations."""
    rows: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    try:
        yield lambda: sum(rows)
    finally:
        handle.remove()


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
