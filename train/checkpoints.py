"""Checkpoints: what a run needs to go on as if nothing had happened, written aside, hashed and renamed."""

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepfuse.data.file_info import file_hash
from stepfuse.data.text_files import write_text
from stepfuse.fuse.lora.keys import CHECKPOINT
from stepfuse.train.engine import Engine

logger = logging.getLogger(__name__)

POLICY, BEST, PROGRESS = "policy.safetensors", "best.safetensors", "progress.json"
MANIFEST = "manifest.json"
# Of every key of POLICY and BEST: without it ComfyUI and diffusers would take the file for a LoRA, load a part of its
# layers, and know nothing of their scale.
PREFIX = f"{CHECKPOINT}."
ASIDE, OLD = "checkpoint.tmp", "checkpoint.old"


@dataclass
class Progress:
    """How far a run has come. The only mutable value of training.

    Attributes:
        step: optimiser steps done.
        kl: of the last step, nats an image; None where it is not measured.
        validation: mean reward of the validation images, `before` and `after`.
        reward: what was fitted of the reward on images of the base.
        best: `step`, `kl` and `validation` of the best checkpoint so far, where they are compared.
        health: what was skipped, collapsed, or stopped the run.
        base_diversity: of the first rollout, which is the base's.
        validation_prompts: prompts of the validation images.
        validation_rewards: rewards of the validation images, in the order of their prompts: `before`, `best` and
            `after`.
        validation_settings: settings that the validation images before training were drawn and scored with.
        prompt_rewards: rewards of earlier steps by prompt (`per_prompt_stat_tracking_buffer_size`).
    """

    step: int = 0
    kl: float | None = 0.0
    validation: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)
    base_diversity: float | None = None
    validation_prompts: list[str] = field(default_factory=list)
    validation_rewards: dict[str, list[float]] = field(default_factory=dict)
    validation_settings: dict[str, Any] = field(default_factory=dict)
    prompt_rewards: dict[str, list[float]] = field(default_factory=dict)


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint whose files are all there, each with the hash it was written with."""
    for folder in reversed(list_checkpoints(output)):
        if not (why := damage(folder)):
            return folder
        logger.warning("%s is not whole, %s; looking for an older one", folder, why)
    return None


def whole_checkpoint(output: Path, wanted: str) -> Path:
    """A checkpoint by its name in the output folder, or by its path.

    Raises:
        ValueError: for one that is not there, or not whole.
    """
    for folder in (output / wanted, Path(wanted)):
        if folder.is_dir():
            if why := damage(folder):
                raise ValueError(f"{folder} is not whole, {why}; resume from `latest`")
            return folder
    raise ValueError(f"no checkpoint {wanted!r} in {output}; expected `latest` or a folder like checkpoint-500")


def damage(folder: Path) -> str:
    """What a checkpoint lacks, in words; empty for a whole one."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wrong = [name for name, sha256 in files.items() if file_hash(folder / name) != sha256]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return f"{wrong[0]} is not as it was written" if wrong else ""


def save_checkpoint(
    output: Path, engine: Engine, progress: Progress, limit: int | None, best: dict[str, Tensor] | None = None
) -> None:
    """Write `checkpoint-STEP`, then drop the oldest beyond the limit; every process takes part.

    Under its name a checkpoint is whole: its files and their hashes are on the disk before it gets it.

    Raises:
        ValueError: where it cannot be written; earlier ones are kept.
    """
    accelerator, aside = engine.accelerator, output / ASIDE
    main = accelerator.is_main_process
    state = engine.trainable_state()  # of every process: it may be in parts
    if main:
        shutil.rmtree(aside, ignore_errors=True)
    failure = ""
    try:
        aside.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        engine.save(aside)
        if main:
            write_state(state, aside / POLICY)
            if best is not None:
                write_state(best, aside / BEST)
            write_text(aside / PROGRESS, json.dumps(asdict(progress)))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        failure = " ".join(str(error).split())
    failures = [line for line in gather_object([failure]) if line]
    if main and not failures:
        try:
            _name(aside, output / f"checkpoint-{progress.step}")
            for old in list_checkpoints(output)[: -limit if limit else 0]:
                _drop(old)
        except OSError as error:
            failures = [str(error)]
    failures = [line for line in gather_object(failures) if line]
    if failures:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(p.name for p in list_checkpoints(output)) or "none yet"
        free = shutil.disk_usage(output).free / 1e6
        raise ValueError(
            f"the checkpoint of step {progress.step} could not be written to {output}, which has {free:,.0f} MB free "
            f"({failures[0]}); earlier ones are kept ({kept}): make room and go on with --resume_from_checkpoint latest"
        )


def load_checkpoint(folder: Path, engine: Engine) -> tuple[Progress, dict[str, Tensor] | None]:
    """Restore policy, optimiser, learning rate and progress; the best policy so far is returned."""
    engine.load(folder, read_state(folder / POLICY))
    best = read_state(folder / BEST) if (folder / BEST).exists() else None
    return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8"))), best


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a policy in a checkpoint by the names of its parameters; those of earlier versions too."""
    return {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}


def write_state(state: dict[str, Tensor], file: Path) -> None:
    """Write the tensors of a policy, by the names of its parameters, under keys that no other tool takes for a LoRA."""
    save_file({f"{PREFIX}{name}": value for name, value in state.items()}, file)


def _name(aside: Path, final: Path) -> None:
    """See that all is on the disk, hashed, and give it its name."""
    names = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file())
    for name in names:
        _sync(aside / name)
    write_text(aside / MANIFEST, json.dumps({"files": {name: file_hash(aside / name) for name in names}}))
    _sync(aside / MANIFEST)
    if final.exists():  # one that was not whole, or not gone on from
        _drop(final)
    aside.rename(final)
    _sync(final.parent)


def _drop(folder: Path) -> None:
    """Take its name away first, so that half of it is never taken for a checkpoint."""
    gone = folder.with_name(OLD)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _sync(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
