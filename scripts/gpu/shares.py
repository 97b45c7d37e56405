"""Where the time of a run goes: the host's launches, waits and copies, and the kernels of the device."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Beginnings of names: calls of the CUDA runtime and driver on the host, and what is no kernel on the device.
HOST = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaLaunchCooperativeKernel"),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy2D"),
    "copies": ("cudaMemcpyAsync", "cudaMemsetAsync"),
}
NO_KERNEL = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Span:
    """An event of a profile, in microseconds."""

    name: str
    on_device: bool
    begin: float
    end: float


def profiled(run: Callable[[], Any], *, pretend: bool = False) -> dict[str, Any]:
    """`shares` of a run after one to warm up; on the pretended device, which has no calls of CUDA, of the CPU alone."""
    run()
    kinds = [ProfilerActivity.CPU, *([] if pretend else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as profiler:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        ended = time.perf_counter()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    events = profiler.events() or []
    spans = [
        Span(event.name, event.device_type == DeviceType.CUDA, event.time_range.start, event.time_range.end)
        for event in events
        if not event.is_user_annotation
    ]
    return {"host_seconds": ended - begin, "operators": len(spans)} | shares(spans, seconds)


def shares(spans: Iterable[Span], seconds: float) -> dict[str, Any]:
    """The share of a time in which the host launches, waits or copies, or the device runs kernels, and how many.

    What overlaps, such as kernels on two streams, counts once.
    """
    spans = list(spans)
    kinds = {
        kind: [span for span in spans if not span.on_device and span.name.startswith(names)]
        for kind, names in HOST.items()
    }
    kinds["kernels"] = [span for span in spans if span.on_device and not span.name.startswith(NO_KERNEL)]
    found = {kind: {"count": len(own), "share": 1e-6 * covered(own) / seconds} for kind, own in kinds.items()}
    return {"seconds": seconds, **found}


def covered(spans: Iterable[Span]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, end))
        end = max(end, span.end)
    return total
