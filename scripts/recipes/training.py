"""A training as a part of a longer run: started as a program, resumed, and found again once finished."""

import os
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


def train(training: Training, launcher: Sequence[str] = (), *, summary: bool = True) -> None:
    """Train from the newest checkpoint, in processes that end with this one, even if it is killed.

    Args:
        launcher: Arguments of `accelerate launch`; without any, one process in float32 that needs no launcher.
        summary: Whether the training prints its result and the next commands; its progress and errors are always shown.

    Raises:
        ValueError: where the training fails or writes no complete adapter.
    """
    name, file = training.settings.title, training.folder.with_name(training.folder.name + ".yaml")
    values = asdict(training.settings) | {"resume_from_checkpoint": "latest", "output_dir": str(training.folder)}
    with atomic_file(file) as temporary:
        write_text(temporary, yaml_text({k: v for k, v in values.items() if v is not None}))
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-P", str(SUPERVISOR), sys.executable]
    if launcher:
        command += ["-m", "accelerate.commands.launch", "--quiet", *launcher, "--num_cpu_threads_per_process", threads]
    command += [str(files("stepfuse.train") / f"{training.settings.algorithm}.py"), "--config", str(file)]
    # Its standard input closes when this process ends. In a new session it gets no Ctrl-C from the terminal.
    stdout = None if summary else subprocess.DEVNULL
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    if not launcher:  # `accelerate launch` sets these itself
        environment |= {f"ACCELERATE_{name}": "no" for name in ("MIXED_PRECISION", "DYNAMO_BACKEND")}
        environment |= {"ACCELERATE_USE_CPU": "false"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, env=environment, start_new_session=True
    ) as process:
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
