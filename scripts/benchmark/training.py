"""What one optimiser step of training costs, rollout and update, beside ddpo-pytorch's and SPO's loops.

Every way trains the same LoRA of the same model on as many images of as many denoising steps, in one precision, scores
pixels that one VAE decodes with one cheap reward, and is measured in turns with the others in one run.
"""

import gc
import importlib.metadata
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import nn
from tqdm import tqdm

from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.scripts.benchmark.models import ATTENTION
from stepfuse.scripts.benchmark.pipelines import with_own_unet
from stepfuse.scripts.benchmark.settings import REFERENCES, TrainingBenchmark
from stepfuse.scripts.benchmark.training_ways import (
    REWARD,
    Row,
    Way,
    base_pipeline,
    rows_of,
    way_of,
)
from stepfuse.scripts.evaluation.costs import counted_rows, free_memory, machine, now, peak_memory

LIBRARIES = ("torch", "diffusers", "peft", "transformers", "accelerate", "stepfuse")
Report = Callable[[dict[str, Any]], None]
Counts = tuple[int | None, int | None]  # rows through UNets, and those of them with a gradient


def benchmark_training(
    settings: TrainingBenchmark, *, progress: bool = True, report: Report = lambda results: None
) -> dict[str, Any]:
    """Time every row in turns, `repeats` rounds, and then measure each one's memory in a process of its own.

    A ratio is of two times of one round, so that what else the machine does falls on both; the median of all rounds
    counts. A round before them warms up, and counts the rows that go through UNets. A row without room is left out.

    Args:
        report: called with the results as soon as the times are known, and again with each row's memory.
    """
    with _prepared(settings):
        seconds, counts, skipped = _time(settings, progress=progress)
        _free(torch.device(settings.device))  # the model is gone: each row's own process loads it anew
        results: dict[str, Any] = {
            "format_version": 1,
            "machine": machine(torch.device(settings.device)),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "settings": asdict(settings) | {"skip_first_steps": settings.skip_first_steps, "reward": REWARD},
            "lora": {"rank": 4, "targets": list(ATTENTION)},
            "skipped": skipped,
            "rows": [_entry(row, seconds, counts, settings.images) for row in seconds],
        }
        report(results)
        if settings.memory:
            eager = [(row, entry) for row, entry in zip(seconds, results["rows"], strict=True) if row.compile == "no"]
            for row, entry in tqdm(eager, disable=not progress, desc="memory"):
                entry["peak_memory_mb"] = _memory_alone(settings, row)
                report(results)
    return results


def training_table(results: dict[str, Any]) -> str:
    """The rows as a table: the rival's time over each one's, with its range over the rounds."""
    lines = [
        "| algorithm | way | images/s | rival's time ÷ its time | range | rows of UNets an image | with gradient "
        "| peak memory, MB |",
        "|---|---|--:|--:|---|--:|--:|--:|",
    ]
    for row in results["rows"]:
        extent = "–" if row["ratio"] is None else f"{row['ratio_min']:.2f}–{row['ratio_max']:.2f}"
        cells = [row["algorithm"], row["name"], f"{row['images_per_second']:.3g}", _cell(row["ratio"], ".2f"), extent]
        cells += [_cell(row[name], "g") for name in ("rows_an_image", "gradient_rows_an_image")]
        lines.append(f"| {' | '.join([*cells, _cell(row['peak_memory_mb'], ',.0f')])} |")
    lines += [f"\n{row}: left out, {why}." for row, why in results["skipped"].items()]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def memory_of(settings: TrainingBenchmark, row: Row) -> float:
    """MB at the peak of the first optimiser step of a row, in this process."""
    with _prepared(settings):
        way = way_of(row, settings, base_pipeline(settings))
        try:
            with peak_memory(torch.device(settings.device)) as peak:
                way.step()
                return peak()
        finally:
            way.close()


@contextmanager
def _prepared(settings: TrainingBenchmark) -> Iterator[None]:
    """This process with the threads and the device that are wanted; accelerate takes a GPU wherever there is one."""
    quiet_libraries()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        with patch_environment(**({"ACCELERATE_USE_CPU": "true"} if settings.device == "cpu" else {})):
            yield
    finally:
        torch.set_num_threads(threads)


def _time(
    settings: TrainingBenchmark, *, progress: bool
) -> tuple[dict[Row, list[float]], dict[Row, Counts], dict[str, str]]:
    """Seconds of each round, and rows through UNets, by row; and why others are left out."""
    device, rows = torch.device(settings.device), rows_of(settings)
    base = base_pipeline(settings)
    ways: dict[Row, Way] = {}
    seconds: dict[Row, list[float]] = {}
    counts: dict[Row, Counts] = {}
    skipped: dict[str, str] = {}

    def refusal(row: Row, turn: int) -> str | None:
        """Take a row's turn, and say why it could not, if so."""
        try:
            if turn == 0:
                if why := _too_large(row, base.unet, device):
                    return why
                ways[row] = way_of(row, settings, with_own_unet(base))
                counts[row] = _rows_of_networks(row, ways[row], counts)
                seconds[row] = []
            else:
                begin = now(device)
                ways[row].step()
                seconds[row].append(now(device) - begin)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return "out of memory"
        return None

    try:
        with tqdm(total=(settings.repeats + 1) * len(rows), disable=not progress, desc="time") as bar:
            for turn in range(settings.repeats + 1):
                for row in rows:
                    bar.set_postfix_str(str(row))
                    if str(row) not in skipped and (why := refusal(row, turn)):
                        skipped[str(row)] = why
                        seconds.pop(row, None)
                        if row in ways:
                            ways.pop(row).close()
                        _free(device)
                    bar.update()
    finally:
        for way in ways.values():
            way.close()
    return seconds, counts, skipped


def _rows_of_networks(row: Row, way: Way, counts: Mapping[Row, Counts]) -> Counts:
    """Take a step, and count the rows that go through UNets; compiled, they are as many as not compiled."""
    if row.compile != "no":
        way.step()
        return counts.get(replace(row, compile="no"), (None, None))
    with ExitStack() as hooks:
        everything = [hooks.enter_context(counted_rows(network)) for network in way.networks]
        trained = [hooks.enter_context(_rows_with_gradient(network)) for network in way.networks]
        way.step()
        return sum(count() for count in everything), sum(count() for count in trained)


@contextmanager
def _rows_with_gradient(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the rows whose outputs a gradient goes back through."""
    total = 0

    def count(_: nn.Module, arguments: tuple, output: tuple) -> None:
        nonlocal total
        total += len(output[0]) if output[0].requires_grad else 0

    handle = network.register_forward_hook(count)
    try:
        yield lambda: total
    finally:
        handle.remove()


def _entry(row: Row, seconds: Mapping[Row, list[float]], counts: Mapping[Row, Counts], images: int) -> dict[str, Any]:
    """A row of the results; its ratios are to the rival as published."""
    own, rival = seconds[row], seconds.get(Row(row.algorithm, REFERENCES[row.algorithm]))
    ratios = [a / b for a, b in zip(rival, own, strict=True)] if rival else None
    rows, trained = counts[row]
    return asdict(row) | {
        "name": row.name,
        "seconds": own,
        "images_per_second": images / statistics.median(own),
        "ratio": ratios and statistics.median(ratios),
        "ratio_min": ratios and min(ratios),
        "ratio_max": ratios and max(ratios),
        "rows_an_image": rows and rows / images,
        "gradient_rows_an_image": trained and trained / images,
        "peak_memory_mb": None,
    }


def _memory_alone(settings: TrainingBenchmark, row: Row) -> float | None:
    """`memory_of` in a fresh process; None where it does not fit, or the system cannot tell."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            peak = process.submit(memory_of, settings, row).result()
        except (MemoryError, RuntimeError, BrokenProcessPool) as error:
            if not isinstance(error, BrokenProcessPool) and not _is_out_of_memory(error):
                raise
            return None
    return None if math.isnan(peak) else peak


def _too_large(row: Row, unet: nn.Module, device: torch.device) -> str | None:
    """Why a rival that copies the UNet cannot be run, if so."""
    if row.way != REFERENCES["dpo"]:
        return None
    size, free = sum(parameter.numel() * parameter.itemsize for parameter in unet.parameters()), free_memory(device)
    return None if size < 0.8 * free else f"a second UNet of {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU, where torch has no error of its own for it."""
    words = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
