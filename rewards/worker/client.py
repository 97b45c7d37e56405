"""A reward whose function runs in a process of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepfuse.rewards.pixels import to_bytes
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.worker.environment import environment_python, last_lines
from stepfuse.rewards.worker.messages import MessageError, batches, encode, receive, send

PROCESS = Path(__file__).parent / "process.py"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """`worker:` of a reward file.

    Attributes:
        function: `file.py:name` or `module:name`: a function of uint8 images (batch, height, width, 3) and prompts that
            returns a number each, or a class that is made once and called so.
        requirements: the file its environment is made from; without one it runs in this one.
        arguments: of the class.
        python: the interpreter of its environment, python3.10 say; by default this one.
        batch_size: images a message.
        timeout: seconds for one batch.
        start_timeout: seconds until the reward is loaded, downloads among them.
    """

    function: str
    requirements: str | None = None
    arguments: dict = field(default_factory=dict)
    python: str | None = None
    batch_size: int = 16
    timeout: float = 300.0
    start_timeout: float = 1800.0


class WorkerReward:
    """Ask a worker, batch by batch, in order; not differentiable.

    Images go as the bytes an image file holds. A worker that dies, hangs or sends what is no answer is started again
    once a batch, and the whole batch is asked anew, so that no score is lost, doubled or attached to another image; a
    reward that raises is not. The process ends with this one, killed or not.

    Args:
        settings: what to run.
        name: in messages.
        folder: what its paths are relative to.

    Raises:
        ValueError: for an environment that cannot be made.
    """

    def __init__(self, settings: WorkerSettings, *, name: str, folder: Path) -> None:
        self.settings, self.name = settings, name
        requirements = settings.requirements
        self.python = environment_python(folder / requirements, settings.python) if requirements else sys.executable
        place, colon, function = settings.function.rpartition(":")
        if not colon or not place or not function:
            raise ValueError(f"worker {name!r} has the function {settings.function!r}; expected file.py:name")
        if place.endswith(".py"):
            place = str((folder / place).resolve())
            if not Path(place).is_file():
                raise ValueError(f"worker {name!r}: no file {place}")
        self.function = f"{place}:{function}"
        self._process: _Process | None = None
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        arrays, values = to_bytes(images), [np.zeros(0)]
        with self._lock:
            for part in batches(arrays, self.settings.batch_size):
                values.append(self._ask(arrays[part], list(prompts[part]), part.start))
        return torch.from_numpy(np.concatenate(values)).float().to(images.device)

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._stop()

    def _ask(self, arrays: np.ndarray, prompts: list[str], first: int) -> np.ndarray:
        problem = ""
        for _ in range(2):
            try:
                process = self._process or self._start()
                return self._answer(process, arrays, prompts)
            except TimeoutError:
                problem = f"gave no answer in {self.settings.timeout:g} s"
            except MessageError as error:
                problem = f"sent what is no answer ({error})"
            except OSError:  # a connection that is closed or broken
                problem = f"died{self._process.status() if self._process else ''}"
            said = self._stop()
        raise ValueError(
            f"worker {self.name!r} {problem}, and so after a restart, on images {first} to {first + len(arrays) - 1} "
            f"of the batch; {said}"
        )

    def _answer(self, process: "_Process", arrays: np.ndarray, prompts: list[str]) -> np.ndarray:
        self._count += 1
        deadline = time.monotonic() + self.settings.timeout
        send(process.connection, encode({"kind": "score", "id": self._count, "prompts": prompts}, [arrays]), deadline)
        header, answers = receive(process.connection, deadline)
        if header.get("id") != self._count:
            raise MessageError(f"an answer to {header.get('id')!r}, not {self._count}")
        if header.get("kind") == "failed":
            raise ValueError(str(header.get("message")))
        if header.get("kind") != "scores" or len(answers) != 1 or answers[0].shape != (len(arrays),):
            raise MessageError(f"{header.get('kind')!r} with {[a.shape for a in answers]}")
        return answers[0]

    def _start(self) -> "_Process":
        self._process = process = _Process(self.python, self.function, self.settings.arguments)
        self._finalizer = weakref.finalize(self, process.stop_here)
        try:
            header, _ = receive(process.connection, time.monotonic() + self.settings.start_timeout)
        except (OSError, MessageError) as error:
            problem = "was not ready in time" if isinstance(error, TimeoutError) else f"did not start{process.status()}"
            raise _NotStarted(f"worker {self.name!r} {problem}; {self._stop()}") from error
        if header.get("kind") != "ready":
            self._stop()
            raise _NotStarted(f"worker {self.name!r} cannot load {self.function}: {header.get('message')}")
        return process

    def _stop(self) -> str:
        """End the process; what it said last."""
        if self._process is None:
            return "it did not run"
        self._finalizer.detach()
        said = self._process.stop()
        self._process = None
        return said


class _NotStarted(ValueError):
    """Starting again would end the same way."""


class _Process:
    """One worker process, its socket, and the file its output goes to."""

    def __init__(self, python: str | Path, function: str, arguments: dict[str, Any]) -> None:
        self.owner = os.getpid()
        self.connection, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (nameless: nothing stays behind, whoever is killed)
        with theirs:
            self.process = subprocess.Popen(
                [str(python), "-u", str(PROCESS), str(theirs.fileno()), function, json.dumps(arguments)],
                stdin=subprocess.PIPE,  # never written to: it closes when this process ends
                stdout=self.log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
                | {"PYTHONIOENCODING": "utf-8:backslashreplace"},  # its log is read as UTF-8, whatever the locale
            )

    def status(self, seconds: float = 5.0) -> str:
        """How it ended, if it does within some seconds; it is left unreaped, so that its number stays its own."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                signalled = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                how = signal.Signals(ended.si_status).name if signalled else f"exit status {ended.si_status}"
                return f" ({how})"
            time.sleep(0.01)
        return ""

    def stop_here(self) -> None:
        """`stop`, unless this is a fork of the process that started it."""
        if os.getpid() == self.owner:
            self.stop()

    def stop(self) -> str:
        """Kill it and all it started; the end of its output."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        with self.log:
            return last_lines(self.log)
