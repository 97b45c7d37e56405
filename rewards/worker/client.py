"""A reward that runs in a worker process."""

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

from stepfuse.data.settings_fields import setting
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.worker.environment import environment_python, last_lines
from stepfuse.rewards.worker.messages import MessageError, receive, send
from stepfuse.rewards.worker.remote import RemoteReward, RequestError

PROCESS = Path(__file__).parent / "process.py"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The key `worker:` of a reward file.

    Attributes:
        function: `file.py:name` or `module:name`. Either a function of uint8 images (batch, height, width, 3) and a
            list of prompts that returns one score per image, or a class whose instances are called so.
        requirements: Requirements file of the worker's environment; by default the worker uses this environment.
        arguments: Keyword arguments of the class.
        python: Interpreter of the worker's environment, such as python3.10; by default this interpreter.
        batch_size: Maximum number of images per message.
        timeout: Seconds that a batch may take.
        start_timeout: Seconds that loading the reward may take, downloads included.
    """

    function: str
    requirements: str | None = None
    arguments: dict = field(default_factory=dict)
    python: str | None = None
    batch_size: int = setting(16, above=0)
    timeout: float = setting(300.0, above=0, finite=False)
    start_timeout: float = setting(1800.0, above=0, finite=False)


class WorkerReward(RemoteReward):
    """A reward that runs in a worker process, started at the first call and stopped with this process.

    If the worker dies, exceeds its timeout or sends invalid data, it is restarted once per batch. It also ends if this
    process is killed. Paths in the settings are relative to the folder.

    Raises:
        ValueError: If the environment cannot be created or the function's file is missing.
    """

    def __init__(self, settings: WorkerSettings, *, name: str, folder: Path) -> None:
        self.settings, self.label, self.batch_size = settings, f"worker {name!r}", settings.batch_size
        requirements = settings.requirements
        self.python = environment_python(folder / requirements, settings.python) if requirements else sys.executable
        module, colon, function = settings.function.rpartition(":")
        if not colon or not module or not function:
            raise ValueError(f"{self.label} has the function {settings.function!r}; expected file.py:name")
        if module.endswith(".py"):
            module = str((folder / module).resolve())
            if not Path(module).is_file():
                raise ValueError(f"{self.label}: no file {module}")
        self.function = f"{module}:{function}"
        self._process: _Process | None = None
        self._lock = threading.Lock()

    def __call__(self, images: Pixels, prompts: Sequence[str]) -> Scores:
        with self._lock:
            return super().__call__(images, prompts)

    def close(self) -> None:
        """Stop the worker. The next call starts another one."""
        with self._lock:
            self.recover()

    def exchange(self, message: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
        process = self._process or self._start()
        deadline = time.monotonic() + self.settings.timeout
        try:
            send(process.connection, message, deadline)
            return receive(process.connection, deadline)
        except TimeoutError as error:
            raise RequestError(f"did not answer within {self.settings.timeout:g} s") from error
        except MessageError as error:
            raise RequestError(f"sent an invalid response ({error})") from error
        except OSError as error:  # the connection is closed or broken
            raise RequestError(f"died{process.exit_reason()}") from error

    def recover(self) -> str:
        """Stop the worker and return the end of its output."""
        if self._process is None:
            return "it is not running"
        self._finalizer.detach()
        process, self._process = self._process, None
        return process.stop()

    def _start(self) -> "_Process":
        process = self._process = _Process(self.python, self.function, self.settings.arguments)
        self._finalizer = weakref.finalize(self, process.stop)
        try:
            header, _ = receive(process.connection, time.monotonic() + self.settings.start_timeout)
        except TimeoutError as error:
            seconds = self.settings.start_timeout
            raise ValueError(f"{self.label} did not load its reward within {seconds:g} s; {self.recover()}") from error
        except (OSError, MessageError) as error:
            problem = f"did not start{process.exit_reason()}"
            raise ValueError(f"{self.label} {problem}; {self.recover()}") from error
        if header.get("kind") != "ready":
            self.recover()
            raise ValueError(f"{self.label} cannot load {self.function}: {header.get('message')}")
        return process


class _Process:
    """A worker process, its socket, and the temporary file that its output is written to."""

    def __init__(self, python: str | Path, function: str, arguments: dict[str, Any]) -> None:
        self.owner = os.getpid()
        self.connection, worker_end = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (without a name: nothing remains if this process is killed)
        with worker_end:
            self.process = subprocess.Popen(
                [str(python), "-u", str(PROCESS), str(worker_end.fileno()), function, json.dumps(arguments)],
                stdin=subprocess.PIPE,  # nothing is written to it; it closes when this process ends
                stdout=self.log,
                stderr=subprocess.STDOUT,
                pass_fds=[worker_end.fileno()],
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
                | {"PYTHONIOENCODING": "utf-8:backslashreplace"},  # the log is read as UTF-8 in any locale
            )

    def exit_reason(self, seconds: float = 5.0) -> str:
        """How the process ended, as " (SIGKILL)" or " (exit status 3)"; empty if it does not end within some seconds.

        It is not reaped here, so that its process id cannot be reused before `stop`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                by_signal = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                return f" ({signal.Signals(ended.si_status).name if by_signal else f'exit status {ended.si_status}'})"
            time.sleep(0.01)
        return ""

    def stop(self) -> str:
        """Kill the worker and the processes it started, and return the end of its output.

        In a fork of the process that started the worker, do nothing.
        """
        if os.getpid() != self.owner:
            return "it belongs to another process"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        with self.log:
            return last_lines(self.log)
