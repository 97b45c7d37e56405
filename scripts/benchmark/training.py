"""What one optimiser step of training costs, rollout and update, beside the loops of others.

Every method trains the same LoRA of the same model on as many images of as many denoising steps, in one precision, and
scores pixels that one VAE decodes with one cheap reward.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import patch_environment
from accelerate.utils.memory import clear_device_cache

from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.scripts.benchmark import harness, memory
from stepfuse.scripts.benchmark.harness import Measured, cell, ratio_range
from stepfuse.scripts.benchmark.settings import REFERENCES, TrainingBenchmark, references, stated_depth, trains_unet
from stepfuse.scripts.benchmark.training_methods import OURS, REWARD, Row, base_pipeline, method_of


def rows_of(settings: TrainingBenchmark) -> list[Row]:
    """The baseline of the model, where there is one, then stepfuse, of each algorithm."""
    rows = []
    for algorithm in settings.algorithms:
        baseline = references(settings.model).get(algorithm)
        ours = [Row(algorithm, OURS)]
        if algorithm == "ddpo":
            ours.append(Row(algorithm, OURS, kl=False))
        rows += [*([Row(algorithm, baseline)] if baseline else []), *ours]
        if (together := settings.timesteps_per_forward) > 1:
            rows += [replace(row, together=together) for row in ours]
        if (fraction := settings.timestep_fraction) < 1:
            if baseline and algorithm == "ddpo":  # SPO has no such setting
                rows.append(Row(algorithm, baseline, fraction=fraction))
            rows.append(Row(algorithm, OURS, fraction=fraction, together=together))
        if settings.compile != "no":
            rows.append(Row(algorithm, OURS, compile=settings.compile))
    return rows


def benchmark_training(settings: TrainingBenchmark, *, report: memory.Report = lambda results: None) -> dict[str, Any]:
    """Time every row in alternation, then measure each one's memory; both are reported as soon as they are known."""
    device = torch.device(settings.device)
    rows, missing = harness.available(rows_of(settings), references(settings.model).values())
    if not trains_unet(settings.model):
        missing |= {", ".join(REFERENCES[name] for name in settings.algorithms): "it trains UNets only"}
    with _prepared(settings):
        base = base_pipeline(settings)
        targets = list(backbone_of(base).targets)
        builders = {row: partial(method_of, row, settings, base) for row in rows}
        measured = harness.measure(builders, repeats=settings.repeats, device=device)
        del base, builders
        clear_device_cache(garbage_collection=True)  # each row loads the model again in its process
        entries = {row: _entry(row, measured, settings) for row in measured.seconds}
        results = {
            "format_version": 1,
            **harness.context(device),
            "settings": asdict(settings) | {"skip_first_steps": settings.skip_first_steps, "reward": REWARD},
            "depth": stated_depth(settings.model, settings.layers),
            "lora": {"rank": 4, "targets": targets},
            "skipped": missing | measured.skipped,
            "rows": list(entries.values()),
        }
        report(results)
        if settings.memory:
            eager = {row: entry for row, entry in entries.items() if row.compile == "no"}
            memory.add_memory(results, eager, memory_of, settings, report)
    return results


def _entry(row: Row, measured: Measured[Row], settings: TrainingBenchmark) -> dict[str, Any]:
    """A row of the results; its ratios are to the baseline as published."""
    baseline, images = Row(row.algorithm, references(settings.model).get(row.algorithm, "")), settings.images
    # Counting hooks would be compiled too; the rows of a compiled network are those of the one that is not.
    batch_rows, with_gradient = measured.batch_rows.get(replace(row, compile="no"), (None, None))
    described = asdict(row)
    return {
        "algorithm": described.pop("algorithm"),
        "way": described.pop("method"),
        **described,
        "name": row.name,
        "seconds": measured.seconds[row],
        "images_per_second": images / statistics.median(measured.seconds[row]),
        **harness.ratios(measured.seconds.get(baseline), measured.seconds[row]),
        "rows_an_image": batch_rows and batch_rows / images,
        "gradient_rows_an_image": with_gradient and with_gradient / images,
        "peak_memory_mb": None,
    }


def memory_of(settings: TrainingBenchmark, row: Row) -> dict[str, float | None]:
    """MB at the peak of the first optimiser step of a row, in this process."""
    with _prepared(settings):
        method = method_of(row, settings, base_pipeline(settings))
        try:
            return {"peak_memory_mb": memory.peak_megabytes(method.run, torch.device(settings.device))}
        finally:
            method.close()


@contextmanager
def _prepared(settings: TrainingBenchmark) -> Iterator[None]:
    """Run with the threads and on the device of the settings; accelerate takes a GPU wherever there is one."""
    quiet_libraries()
    with (
        harness.cpu_threads(settings.threads),
        patch_environment(**({"ACCELERATE_USE_CPU": "true"} if settings.device == "cpu" else {})),
    ):
        yield


def training_table(results: dict[str, Any]) -> str:
    columns: harness.Columns = [
        ("algorithm", cell("algorithm")),
        ("method", cell("name")),
        ("images/s", cell("images_per_second", ".3g")),
        ("baseline's time ÷ its time", cell("ratio", ".2f")),
        ("range", ratio_range),
        ("rows of networks an image", cell("rows_an_image", "g")),
        ("with gradient", cell("gradient_rows_an_image", "g")),
        ("peak memory, MB", cell("peak_memory_mb", ",.0f")),
    ]
    return harness.results_table(columns, results)
