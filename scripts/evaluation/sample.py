"""Sampling the cells of an evaluation, and measuring every image: a table for each cell and batch of prompts."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from stepfuse.data.images import to_image
from stepfuse.data.output_file import atomic_file
from stepfuse.scripts.evaluation.batch import MetricBatch, sample_batch
from stepfuse.scripts.evaluation.config import PlannedCell
from stepfuse.scripts.evaluation.metrics import all_metrics
from stepfuse.scripts.evaluation.prepare import Evaluation


def sample_cells(
    evaluation: Evaluation, folder: Path, state: PartialState, cells: Sequence[PlannedCell]
) -> pd.DataFrame:
    """Sample and measure cells, a file for each batch; files that exist are kept. The table of all their images.

    Cells whose images are the same, as they are one adapter under several rules, share the files of the first of them.
    A ValueError of a reward names the cell; the files written before are kept.
    """
    keys, batches = [cell.images for cell in evaluation.cells], evaluation.batches
    files = {
        (i, j): folder / f"{i:04d}-{j:04d}.parquet"
        for i in dict.fromkeys(keys.index(cell.images) for cell in cells)
        for j in range(len(batches))
    }
    order = list(evaluation.sets)  # set by set, as one is loaded at a time
    by_set = sorted(files.items(), key=lambda item: order.index(evaluation.cells[item[0][0]].set))
    of_this_process = by_set[state.process_index :: state.num_processes]
    bar = tqdm(of_this_process, disable=not state.is_main_process, desc="evaluate", unit="batch")
    for (i, j), file in bar:
        cell = evaluation.cells[i]
        bar.set_postfix_str(str(cell))
        if file.exists():
            continue
        try:
            table = measure(sample_batch(evaluation, cell, batches[j]))
        except ValueError as error:
            raise ValueError(f"{cell}: {error}; run again to resume, the finished batches are kept") from error
        with atomic_file(file) as temporary:
            table.to_parquet(temporary)
    state.wait_for_everyone()
    tables = [
        pd.read_parquet(files[keys.index(cell.images), j]).assign(rule=cell.label)
        for cell in cells
        for j in range(len(batches))
    ]
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def measure(batch: MetricBatch) -> pd.DataFrame:
    """A row for each image: its cell, prompt and seed, and every metric."""
    cell, evaluation, names = batch.cell, batch.evaluation, batch.evaluation.adapter_set.names
    pictured = evaluation.prompts[: evaluation.config.strip_prompts]
    pictures = [
        _png(pixels) if seed == 0 and prompt in pictured else None
        for (prompt, seed), pixels in zip(batch.images, batch.pixels, strict=True)
    ]
    return pd.DataFrame(
        {
            "rule": cell.label,
            "weights": cell.weights_label,
            **{f"w_{name}": share for name, share in zip(names, cell.shares(names), strict=True)},
            "strength": cell.strength,
            "prompt": batch.prompts,
            "seed": batch.seeds,
            **{metric.name: metric.measure(batch) for metric in all_metrics(list(evaluation.rewards))},
            "image": pictures,
        }
    )


def _png(pixels: Tensor) -> bytes:
    buffer = BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
