"""A training as a part of a longer run: started with `accelerate launch`, resumed, and found again once finished."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch

from stepfuse.data.output_file import atomic_file
from stepfuse.data.text_files import write_text
from stepfuse.data.yaml_file import yaml_text
from stepfuse.fuse.sets.create import find_adapters
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.init_set import run_hash
from stepfuse.train.settings import TrainSettings

SUPERVISOR = Path(__file__).parent / "supervisor.py"
SINGLE_PROCESS = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One adapter to be trained, or several together, and the folder that its program writes."""

    settings: TrainSettings
    folder: Path

    @cached_property
    def sha256(self) -> str:
        return run_hash(self.settings)

    @property
    def names(self) -> list[str]:
        """The names of its objectives."""
        return [each.name for each in self.settings.each]

    @property
    def finished(self) -> list[Adapter]:
        """The adapters, where they were trained with these settings; otherwise empty."""
        try:
            adapters = find_adapters(self.folder)
        except ValueError:
            return []
        trained = all(adapter.record.get("config_sha256") == self.sha256 for adapter in adapters)
        return adapters if trained and [adapter.name for adapter in adapters] == self.names else []


def train(training: Training, launcher: Sequence[str], *, summary: bool = True) -> None:
    """Train by `accelerate launch`, from the newest checkpoint; its processes end with this one, even if it is killed.

    Args:
        summary: Whether the training prints its result and the next commands; its progress and errors are always shown.

    Raises:
        ValueError: where the training fails or writes no complete adapter.
    """
    name, file = training.settings.title, training.folder.with_name(training.folder.name + ".yaml")
    values = asdict(training.settings) | {"resume_from_checkpoint": "latest", "output_dir": str(training.folder)}
    with atomic_file(file) as temporary:
        write_text(temporary, yaml_text({k: v for k, v in values.items() if v is not None}))
    command = [sys.executable, "-P", str(SUPERVISOR), sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += [*launcher, "--num_cpu_threads_per_process", str(torch.get_num_threads())]
    command += [str(files("stepfuse.train") / f"{training.settings.algorithm}.py"), "--config", str(file)]
    # Its standard input closes when this process ends. In a new session it gets no Ctrl-C from the terminal.
    stdout = None if summary else subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, start_new_session=True) as process:
        try:
            status = process.wait()
        except BaseException:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            raise
    if status:
        raise ValueError(f"training {name!r} ended with status {status}; see the lines above, and run again to resume")
    if not training.finished:
        raise ValueError(f"training {name!r} wrote no complete adapter to {training.folder}")
