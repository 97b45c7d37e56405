"""What a step of fused sampling costs, as a ratio to one adapter with guidance, measured in turns in one run."""

import gc
import importlib.metadata
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from stepfuse.scripts.benchmark.rivals import RIVALS
from stepfuse.scripts.benchmark.settings import BASELINES, SamplingBenchmark
from stepfuse.scripts.benchmark.ways import REFERENCE, Bench, Row, Way, rows_of
from stepfuse.scripts.evaluation.costs import counted_rows, free_memory, machine, now, peak_memory

LIBRARIES = ("torch", "diffusers", "peft", "transformers")
Report = Callable[[dict[str, Any]], None]


@torch.no_grad()
def benchmark_sampling(
    settings: SamplingBenchmark, *, progress: bool = True, report: Report = lambda results: None
) -> dict[str, Any]:
    """Time every row in turns, `repeats` rounds, and then measure each one's memory in a process of its own.

    A ratio is of two times of one round, so that what else the machine does falls on both; the median of all rounds
    counts. The first round warms up and is left out.

    Args:
        report: called with the results as soon as the times are known, and again with each row's memory.
    """
    device = torch.device(settings.device)
    seconds, counts, results = _time(settings, device, progress=progress)
    gc.collect()  # the model is gone: each row's own process loads it anew
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reference = Row(REFERENCE, 1)
    for row, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        results["rows"].append(
            {
                "way": row.way,
                "adapters": row.adapters,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "seconds_a_step": statistics.median(own) / settings.steps,
                "rows_an_image": counts[row],
                "rows_ratio": counts[row] / counts[reference],
                "compiled": bool(settings.compile) and row.way not in BASELINES,
                "weights_mb": None,
                "peak_memory_mb": None,
            }
        )
    report(results)
    if settings.memory:
        for row, entry in tqdm(list(zip(seconds, results["rows"], strict=True)), disable=not progress, desc="memory"):
            entry["weights_mb"], entry["peak_memory_mb"] = _memory_alone(settings, row)
            report(results)
    return results


def _time(
    settings: SamplingBenchmark, device: torch.device, *, progress: bool
) -> tuple[dict[Row, list[float]], dict[Row, float], dict[str, Any]]:
    """Seconds of each round, and rows an image and step, by row; and results without rows as yet."""
    bench, skipped = Bench(settings), {}
    ways: dict[Row, Way] = {}
    for row in sorted(rows_of(settings), key=lambda row: row.way not in RIVALS):  # those that copy the UNet first
        if why := _too_large(row, bench, device):
            skipped[str(row)] = why
            continue
        if row.way not in BASELINES and bench.sampler.denoiser.batched is None:
            bench.batch()
        ways[row] = bench.way(row)
    counts: dict[Row, float] = {}
    seconds: dict[Row, list[float]] = {row: [] for row in rows_of(settings) if row in ways}
    with tqdm(total=(settings.repeats + 1) * len(ways), disable=not progress, desc="time") as bar:
        for turn in range(settings.repeats + 1):
            for row in list(seconds):
                bar.set_postfix_str(str(row))
                try:
                    if turn == 0:
                        counts[row] = _rows_of_networks(ways[row]) / settings.images / settings.steps
                    else:
                        begin = now(device)
                        ways[row].run()
                        seconds[row].append(now(device) - begin)
                except torch.OutOfMemoryError:
                    if row.way == REFERENCE:
                        raise ValueError(
                            "one adapter does not fit; give fewer --images or a smaller --height"
                        ) from None
                    skipped[str(row)] = "out of memory"
                    del seconds[row]
                bar.update()
    lora = {"rank": bench.model.lora.r, "targets": sorted(bench.model.lora.target_modules)}
    return (
        seconds,
        counts,
        {
            "machine": machine(device),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "settings": asdict(settings),
            "lora": lora,
            "skipped": skipped,
            "rows": [],
        },
    )


def _rows_of_networks(way: Way) -> int:
    """Rows that go through a way's networks in one run."""
    with ExitStack() as hooks:
        counts = [hooks.enter_context(counted_rows(network)) for network in way.networks]
        way.run()
        return sum(count() for count in counts)


def _memory_alone(settings: SamplingBenchmark, row: Row) -> tuple[float | None, float | None]:
    """MB of weights, and at the peak of one step, of a row in a fresh process; None where it does not fit."""
    alone = replace(settings, adapters=(row.adapters,), steps=1, compile="", mode="")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(memory_of, alone, row).result()
        except (torch.OutOfMemoryError, BrokenProcessPool):
            return None, None


@torch.no_grad()
def memory_of(settings: SamplingBenchmark, row: Row) -> tuple[float, float]:
    """MB of weights, LoRAs and their copies included, and at the peak of a run, in this process."""
    bench = Bench(settings)
    if row.way not in BASELINES:
        bench.batch()
    way = bench.way(row)
    weights = sum(_bytes_of(network) for network in way.networks)
    del bench  # a rival with UNets of its own does without the first
    gc.collect()
    with peak_memory(torch.device(settings.device)) as peak:
        way.run()
    return weights / 1e6, peak()


def _bytes_of(unet: nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in (*unet.parameters(), *unet.buffers()))


def _too_large(row: Row, bench: Bench, device: torch.device) -> str | None:
    """Why a rival that copies the UNet cannot be run, if so."""
    copies = {"diffusion_blend": row.adapters, "mixed_batch": 2}.get(row.way, 0)
    each, free = _bytes_of(bench.plain), free_memory(device)
    if copies * each < 0.8 * free:
        return None
    return f"{copies} UNets of {each / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def markdown_table(results: dict[str, Any]) -> str:
    """The rows as a table: the ratio with its range over the rounds, and the ratio of the rows that networks ran."""
    lines = [
        "| way | adapters | time ÷ one adapter | range | rows ÷ its rows | ms a step | weights, MB | peak memory, MB |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        memory = ["–" if row[key] is None else f"{row[key]:,.0f}" for key in ("weights_mb", "peak_memory_mb")]
        lines.append(
            f"| {row['way']} | {row['adapters']} | {row['ratio']:.2f} | {row['ratio_min']:.2f}–{row['ratio_max']:.2f} "
            f"| {row['rows_ratio']:.2f} | {1e3 * row['seconds_a_step']:.1f} | {' | '.join(memory)} |"
        )
    lines += [f"\n{row}: left out, {why}." for row, why in results["skipped"].items()]
    return "\n".join(lines)
