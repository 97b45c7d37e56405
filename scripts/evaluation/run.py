"""`stepfuse evaluate`: sample every cell of an evaluation, measure the images, and report.

OUT/
  evaluation.json    what the images depend on, which must be the same for a run to be resumed, and the measured scales
  parts/             a table for each cell and batch of prompts: what an interrupted run keeps
  results.parquet    a row for each image
  summary.json       the figures
  report.html        the page
  fronts.png         its fronts in one picture
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from stepfuse.data.folder_files import files_below, files_named
from stepfuse.data.json_file import write_json
from stepfuse.data.output_file import atomic_file
from stepfuse.data.output_folder import delete_files, require_empty_dir
from stepfuse.fuse.sampling.rewards import check_trusted
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.manifest import read_versioned
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.plots import save_fronts
from stepfuse.scripts.evaluation.prepare import Evaluation
from stepfuse.scripts.evaluation.report import write_report
from stepfuse.scripts.evaluation.sample import sample_cells

DESCRIPTION, PARTS = "evaluation.json", "parts"
RESULTS = ("results.parquet", "summary.json", "report.html", "fronts.png")
MEASURED = "measured_scales"  # in the description, and no part of what must be the same


def evaluate(
    adapter_set: str | Path,
    config: EvaluationConfig,
    output: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    command: str = "",
    trust_rewards: bool = False,
    reward_dtype: torch.dtype = torch.float32,
    decode_batch_size: int | None = None,
) -> dict[str, Any]:
    """Sample, measure and report; returns the figures. An interrupted run resumes, with the same numbers.

    Scales that the configuration does not give are measured on the images of the base, which are sampled first. Sets
    that rules name are sampled one after another, with their adapters on the same base.
    Rewards of the set that are code or servers are loaded with `trust_rewards` only. Under `accelerate launch` the
    batches are divided among the processes, and the main one reports.

    Raises:
        ValueError: before anything is sampled, for an unknown rule, a rule without its reward or oracle, a set of
            other objectives or another base, or a reward that does not work; and for a reward that fails later.
    """
    state = PartialState(cpu=device == "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) != state.num_processes:
        raise ValueError(
            f"launched as {os.environ['WORLD_SIZE']} processes that do not see each other; on CPU launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"
        )
    loaded = load_set(adapter_set, read_weights=False)
    for objective in loaded.objectives:
        check_trusted(objective, trusted=trust_rewards)
    evaluation = Evaluation.prepare(
        loaded, config, device=device, dtype=dtype, reward_dtype=reward_dtype, decode_batch_size=decode_batch_size
    )
    identity = evaluation.identity(dtype)
    if state.is_main_process:
        _claim(output, identity, overwrite=overwrite)
    state.wait_for_everyone()
    if evaluation.unscaled:
        base = sample_cells(evaluation, output / PARTS, state, evaluation.cells[:1])
        evaluation = evaluation.with_measured_scales(base)
        if state.is_main_process:
            measured = {name: evaluation.scales[name] for name in loaded.names}
            write_json(output / DESCRIPTION, identity | {MEASURED: measured})
    results = sample_cells(evaluation, output / PARTS, state, evaluation.cells)
    if not state.is_main_process:
        return {}
    setup = evaluation.setup(str(adapter_set), command)
    summary = summarise(results, setup)
    table, figures, page, fronts = (output / name for name in RESULTS)
    with atomic_file(table) as temporary:
        results.to_parquet(temporary)
    write_json(figures, summary)
    with atomic_file(page) as temporary:
        write_report(temporary, results, summary, setup)
    save_fronts(fronts, summary)
    return summary


def evaluation_files(folder: Path) -> set[Path]:
    """The files of the evaluation in a folder, which --overwrite replaces; none where there is no evaluation."""
    try:
        read_versioned(folder / DESCRIPTION, "an evaluation")
    except ValueError:
        return set()
    parts = {file for file in files_below(folder, PARTS) if file.suffix in (".parquet", ".tmp")}
    return parts | files_named(folder, DESCRIPTION, *RESULTS)


def _claim(output: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Accept an empty folder, one that an earlier run of the same evaluation began, or with `overwrite` any."""
    writes = (DESCRIPTION, PARTS, *RESULTS) if overwrite else ()
    folder = require_empty_dir(output, overwrite=True, ours=evaluation_files, writes=writes)
    if overwrite:
        delete_files(output, evaluation_files(folder))
    file = folder / DESCRIPTION
    if not file.is_file():
        require_empty_dir(output, overwrite=overwrite)
        write_json(file, identity)
        return
    stored = read_versioned(file, "an evaluation")
    stored.pop(MEASURED, None)
    if stored != json.loads(json.dumps(identity)):
        raise ValueError(
            f"output {output} holds another evaluation (its config, prompts or adapters differ); choose another or "
            "pass --overwrite"
        )
