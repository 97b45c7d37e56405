"""Training that is killed in its second step, and what it ends with when it goes on, to the bit."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepfuse.scripts.benchmark.models import random_pipeline
from stepfuse.scripts.gpu.pretend import prepare
from stepfuse.scripts.gpu.process import Place, Report
from stepfuse.train.algorithms import DDPO
from stepfuse.train.loop import train_adapter
from stepfuse.train.settings import DDPOSettings


class Killed(DDPO):
    """DDPO whose process is killed where the first loss of the second step is computed."""

    def loss(self, *arguments: Any, **options: Any) -> Any:
        if (Path(self.settings.output_dir) / "checkpoint-1").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(*arguments, **options)


def kill_and_resume(place: Place, report: Report, *, base: str, images: int, steps: int) -> dict[str, Any]:
    """Train two steps, and again with a kill in the second: both end with the same adapter.

    Each run is in a process of its own, with deterministic algorithms. A ValueError says what differs.
    """
    whole, broken = place.folder / "whole", place.folder / "broken"
    common = (place, base, images, steps)
    codes = {
        "whole": _process(place.start, *common, whole, DDPO),
        "killed": _process(place.start, *common, broken, Killed),
        "resumed": _process(place.start, *common, broken, DDPO),
    }
    report({"exit_codes": codes})
    expected = {"whole": 0, "killed": -signal.SIGKILL, "resumed": 0}
    if codes != expected:
        raise ValueError(f"the runs ended with exit codes {codes}; expected {expected}")
    first, second = _adapter(whole), _adapter(broken)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    moved = sum(bool(value.any()) for name, value in first.items() if "_lora.up." in name or "lora_B" in name)
    if different or not moved:
        raise ValueError(f"{len(different)} of {len(first)} tensors differ after the resume, {moved} B are not zero")
    return {"exit_codes": codes, "tensors": len(first), "equal": True}


def _process(start: str, *arguments: Any) -> int | None:
    context: Any = multiprocessing.get_context(start)
    process = context.Process(target=_train, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _train(place: Place, base: str, images: int, steps: int, output: Path, algorithm: type[DDPO]) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which deterministic matrix products need
    if place.start == "spawn":
        prepare(place)
    torch.use_deterministic_algorithms(True)
    if not base:
        base = str(place.folder / "base")
        if not Path(base).is_dir():
            random_pipeline("sd15").save_pretrained(base)
    settings = DDPOSettings(
        pretrained_model_name_or_path=base,
        prompts="emoji",
        reward="colourfulness",
        output_dir=str(output),
        report_to="none",
        mixed_precision="bf16",
        train_batch_size=images,
        num_generations=images,
        sample_num_steps=steps,
        num_validation_images=2,
        learning_rate=1e-3,
        max_train_steps=2,
        checkpointing_steps=1,
        resume_from_checkpoint="latest",
    )
    train_adapter(settings, algorithm(settings))


def _adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")
