"""What the parts do, each in a process of its own. Importing this does not use the GPU."""

from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from stepfuse.scripts.benchmark import harness
from stepfuse.scripts.benchmark.sampling import Bench, benchmark_sampling
from stepfuse.scripts.benchmark.sampling import Row as SamplingRow
from stepfuse.scripts.benchmark.settings import SamplingBenchmark, TrainingBenchmark
from stepfuse.scripts.benchmark.training import benchmark_training, memory_of, rows_of
from stepfuse.scripts.benchmark.training_methods import OURS, base_pipeline, method_of
from stepfuse.scripts.benchmark.training_methods import Row as TrainingRow
from stepfuse.scripts.gpu.marked import marked_tests
from stepfuse.scripts.gpu.pretend import prepare
from stepfuse.scripts.gpu.process import Place, Report
from stepfuse.scripts.gpu.resume import kill_and_resume
from stepfuse.scripts.gpu.shares import profiled

__all__ = [
    "describe",
    "kill_and_resume",
    "marked_tests",
    "prepare",
    "profile_sampling",
    "profile_training",
    "sampling",
    "training",
]


def describe(place: Place, report: Report) -> dict[str, Any]:
    """The GPU and the libraries; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return {}
    torch.zeros(1, device="cuda")  # an error where this process was forked from one that has used the GPU
    return harness.context(torch.device("cuda"))


def sampling(place: Place, report: Report, **values: Any) -> dict[str, Any]:
    """Times of fused sampling, and of the baselines."""
    settings = SamplingBenchmark(**values, rules=("product",), memory=False, device="cuda")
    return benchmark_sampling(settings, report=report)


def training(place: Place, report: Report, **values: Any) -> dict[str, Any]:
    """Images a second of optimiser steps, then the peak memory of one of each row."""
    settings = TrainingBenchmark(**values, memory=False, device="cuda")
    results = benchmark_training(settings, report=report)
    entries = {entry["name"]: entry for entry in results["rows"]}
    rows = [row for row in rows_of(settings) if row.name in entries]
    for row in rows[:1] if place.pretend else rows:  # the pretended device has no memory to measure
        clear_device_cache(garbage_collection=True)
        entries[row.name].update(memory_of(settings, row))
        report(results)
    return results


@torch.no_grad()
def profile_sampling(place: Place, report: Report, **values: Any) -> dict[str, Any]:
    """Shares of one run of the product."""
    settings = SamplingBenchmark(**values, rules=("product",), memory=False, device="cuda")
    method = Bench(settings).method(SamplingRow("product", *settings.adapters))
    return profiled(method.run, pretend=place.pretend)


def profile_training(place: Place, report: Report, **values: Any) -> dict[str, Any]:
    """Shares of one optimiser step of DDPO."""
    settings = TrainingBenchmark(**values, memory=False, device="cuda")
    method = method_of(TrainingRow("ddpo", OURS), settings, base_pipeline(settings))
    try:
        return profiled(method.run, pretend=place.pretend)
    finally:
        method.close()
