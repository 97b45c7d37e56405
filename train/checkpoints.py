"""Checkpoints: everything a run needs to resume exactly, written to a temporary folder, hashed and renamed."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.data.file_info import file_hash
from stepfuse.data.folder_files import files_below
from stepfuse.data.text_files import write_text
from stepfuse.fuse.lora.keys import CHECKPOINT
from stepfuse.train.engine import Engine

logger = logging.getLogger(__name__)

POLICY, BEST, PROGRESS = "policy.safetensors", "best.safetensors", "progress.json"
MANIFEST = "manifest.json"
# Prefix of the keys of POLICY and BEST. Without it ComfyUI and diffusers would load the file as a LoRA, without some of
# its layers and with a wrong scale.
PREFIX = f"{CHECKPOINT}."
TEMPORARY, OLD = "checkpoint.tmp", "checkpoint.old"  # folders while a checkpoint is written, or deleted


@dataclass
class Progress:
    """How far a run has come. It is the only mutable value of training.

    Attributes:
        step: number of optimiser steps done.
        kl: KL of the last step in nats per image; None if it is not measured.
        kl_steps: KL of each denoising step when it was last trained on, None for one that never was; empty if it is not
            measured.
        vertex_kl_steps: of a run with several objectives, that of the images with all weight on one, by its name.
        validation: mean reward of the validation images, `before` and `after`; of a run with several objectives that of
            their weighted rewards, and the mean rewards at each point of `validation_points`.
        reward: the fit of the reward on images of the base.
        best: `step`, `kl` and `validation` of the best checkpoint so far, if they are compared.
        best_settings: settings that its validation images were drawn and scored with.
        best_kl_steps, best_vertex_kl_steps: its `kl_steps` and `vertex_kl_steps`.
        best_state: its tensors, which a checkpoint has in a file of their own.
        health: what was skipped, collapsed, or stopped the run.
        base_diversity: diversity of the first rollout, which is that of the base.
        validation_prompts: prompts of the validation images before training.
        validation_rewards: rewards of the validation images by prompt: `before`, `best` and `after`; of a run with
            several objectives, by point and objective.
        validation_settings: settings that the validation images before training were drawn and scored with.
        prompt_rewards: rewards of earlier steps by prompt (`per_prompt_stat_tracking_buffer_size`).
    """

    step: int = 0
    kl: float | None = 0.0
    kl_steps: list[float | None] = field(default_factory=list)
    vertex_kl_steps: dict[str, list[float | None]] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    best_settings: dict[str, Any] = field(default_factory=dict)
    best_kl_steps: list[float | None] = field(default_factory=list)
    best_vertex_kl_steps: dict[str, list[float | None]] = field(default_factory=dict)
    best_state: dict[str, Tensor] | None = None
    health: list[dict[str, Any]] = field(default_factory=list)
    base_diversity: float | None = None
    validation_prompts: list[str] = field(default_factory=list)
    validation_rewards: dict[str, Any] = field(default_factory=dict)
    validation_settings: dict[str, Any] = field(default_factory=dict)
    prompt_rewards: dict[str, list[float]] = field(default_factory=dict)


def checkpoint_files(output: Path) -> set[Path]:
    """The files of checkpoints that were written by training, complete or not, as paths relative to the folder."""
    named = (POLICY, PROGRESS, MANIFEST)
    ours = [folder.name for folder in list_checkpoints(output) if any((folder / name).is_file() for name in named)]
    return files_below(output, TEMPORARY, OLD, *ours)


def newest_intact(output: Path) -> Path | None:
    """The newest checkpoint with all its files, each with the hash that was recorded."""
    for folder in reversed(list_checkpoints(output)):
        if not (why := damage(folder)):
            return folder
        logger.warning("%s is damaged, %s; looking for an older one", folder, why)
    return None


def find_checkpoint(output: Path, wanted: str) -> Path:
    """A checkpoint by its name in the output folder, or by its path; ValueError if it does not exist or is damaged."""
    for folder in (output / wanted, Path(wanted)):
        if folder.is_dir():
            if why := damage(folder):
                raise ValueError(f"{folder} is damaged, {why}; resume from `latest`")
            return folder
    raise ValueError(f"no checkpoint {wanted!r} in {output}; expected `latest` or a folder like checkpoint-500")


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; empty for an intact one."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wrong = [name for name, sha256 in files.items() if file_hash(folder / name) != sha256]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return f"{wrong[0]} has another hash than recorded" if wrong else ""


def save_checkpoint(output: Path, engine: Engine, progress: Progress, limit: int | None) -> None:
    """Write `checkpoint-STEP`, then delete the oldest beyond the limit; all processes take part.

    The folder gets its name when its files and their hashes are on the disk, so that a checkpoint is complete.

    Raises:
        ValueError: if it cannot be written; earlier ones are kept.
    """
    accelerator, temporary = engine.accelerator, output / TEMPORARY
    main = accelerator.is_main_process
    state = engine.trainable_state()  # on every process: it may be partitioned
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
    failures: list[str] = []
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        engine.save(temporary)
        if main:
            write_state(state, temporary / POLICY)
            values = vars(progress).copy()
            if (best := values.pop("best_state")) is not None:
                write_state(best, temporary / BEST)
            write_text(temporary / PROGRESS, json.dumps(values))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        failures = [" ".join(str(error).split())]
    failures = gather_object(failures)
    if main and not failures:
        try:
            _publish(temporary, output / f"checkpoint-{progress.step}")
            for old in list_checkpoints(output)[: -limit if limit else 0]:
                _delete(old)
        except OSError as error:
            failures = [str(error)]
    if failures := gather_object(failures):
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = ", ".join(p.name for p in list_checkpoints(output)) or "none yet"
        free = shutil.disk_usage(output).free / 1e6
        raise ValueError(
            f"the checkpoint of step {progress.step} could not be written to {output}, which has {free:,.0f} MB free "
            f"({failures[0]}); earlier ones are kept ({kept}): free some space and resume with "
            "--resume_from_checkpoint latest"
        )


def load_checkpoint(folder: Path, engine: Engine) -> Progress:
    """Restore policy, optimiser and learning rate, and read the progress."""
    engine.load(folder, read_state(folder / POLICY))
    values = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return Progress(**values, best_state=read_state(folder / BEST) if (folder / BEST).exists() else None)


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a policy in a checkpoint, also of an earlier version, by the names of its parameters."""
    return {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}


def write_state(state: dict[str, Tensor], file: Path) -> None:
    """Write the tensors of a policy, with keys that no other tool reads as a LoRA."""
    save_file({f"{PREFIX}{name}": value for name, value in state.items()}, file)


def _publish(temporary: Path, final: Path) -> None:
    """Write all files to the disk, record their hashes, and rename the folder."""
    names = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
    for name in names:
        _sync(temporary / name)
    write_text(temporary / MANIFEST, json.dumps({"files": {name: file_hash(temporary / name) for name in names}}))
    _sync(temporary / MANIFEST)
    if final.exists():  # a damaged one, or one that was not resumed from
        _delete(final)
    temporary.rename(final)
    _sync(final.parent)


def _delete(folder: Path) -> None:
    """Rename the folder first, so that no part of it is taken for a checkpoint."""
    old = folder.with_name(OLD)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
