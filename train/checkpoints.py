"""Checkpoints: the trainable state, the optimiser and the step, written aside and renamed."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from stepfuse.train.lora import Policy


@dataclass
class Progress:
    """How far a run has come. The only mutable value of training.

    Attributes:
        step: optimiser steps done.
        kl: of the last step, nats an image.
        validation: mean reward of the validation images, `before` and `after`.
        reward: what was fitted of the reward on images of the base.
    """

    step: int = 0
    kl: float = 0.0
    validation: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)


POLICY, PROGRESS = "policy.safetensors", "progress.json"


def find_checkpoint(output: Path, wanted: str | None) -> Path | None:
    """The checkpoint folder to resume from: `latest`, or a folder by name or path.

    Raises:
        ValueError: where there is none.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = list_checkpoints(output)
        if not found:
            raise ValueError(f"no checkpoint in {output} to resume from; train without --resume_from_checkpoint")
        return found[-1]
    for folder in (output / wanted, Path(wanted)):
        if (folder / PROGRESS).is_file():
            return folder
    raise ValueError(f"no checkpoint {wanted!r} in {output}; expected `latest` or a folder like checkpoint-500")


def list_checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / PROGRESS).is_file()), key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(
    output: Path, accelerator: Accelerator, policy: Policy, progress: Progress, limit: int | None
) -> None:
    """Write `checkpoint-STEP`, then drop the oldest beyond the limit."""
    aside = output / "checkpoint.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    hook = accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    try:  # the models are left out: the base never changes, and the policy is written below
        accelerator.save_state(str(aside))
    finally:
        hook.remove()
    if accelerator.is_main_process:
        state = {name: value.detach().contiguous().cpu() for name, value in policy.trainable_state().items()}
        save_file(state, aside / POLICY)
        (aside / PROGRESS).write_text(json.dumps(asdict(progress)))
        final = output / f"checkpoint-{progress.step}"
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in list_checkpoints(output)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(folder: Path, accelerator: Accelerator, policy: Policy) -> Progress:
    """Restore policy, optimiser, learning rate and progress."""
    hook = accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    try:
        accelerator.load_state(str(folder))
    finally:
        hook.remove()
    policy.load_trainable_state(load_file(folder / POLICY))
    return Progress(**json.loads((folder / PROGRESS).read_text()))
