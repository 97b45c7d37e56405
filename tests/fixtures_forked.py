"""Trainings in children of one `accelerate launch`, each of which costs no new start: `tests/forked_training.py`."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from accelerate.utils.other import get_free_port

from tests.fixtures_training import SINGLE_PROCESS, as_flags, launch_command

PROGRAM = Path(__file__).parent / "forked_training.py"
RUN_SECONDS = 900.0  # of one training, at most: DeepSpeed may compile an extension first


@contextmanager
def launched(
    folder: Path, launcher: Sequence[str] = SINGLE_PROCESS, *, processes: int = 1, start_seconds: float = 300
) -> Iterator[list[TextIO]]:
    """The launched processes by rank, in a folder where their children write `child.log`."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory(prefix="launched")), "socket")  # its path must be short
        server = stack.enter_context(socket.create_server(str(place), family=socket.AF_UNIX))
        server.settimeout(start_seconds)
        command = launch_command(PROGRAM, str(place), launcher=launcher)
        stack.callback(_end, subprocess.Popen(command, cwd=folder, start_new_session=True))
        by_rank = {}
        for _ in range(processes):
            connection = stack.enter_context(server.accept()[0])
            connection.settimeout(RUN_SECONDS)
            stream = stack.enter_context(connection.makefile("rw", encoding="utf-8"))
            by_rank[int(stream.readline())] = stream
        yield [by_rank[rank] for rank in range(processes)]
        # The connections are closed first, at which the program ends; then it is waited for.


def _end(program: subprocess.Popen) -> None:
    try:
        program.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()


class Training:
    """One run, in a child of each process that was launched."""

    def __init__(
        self,
        processes: list[TextIO],
        output: str,
        program: str = "ddpo",
        environment: dict[str, str] | None = None,
        **flags: object,
    ) -> None:
        self.processes = processes
        flags = {"config": f"{program}.yaml", "output_dir": output} | flags
        # Children meet at a port of their own, where the first of them listens, and not the launcher.
        meeting = {"MASTER_PORT": str(get_free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        message = json.dumps([program, as_flags(flags), (meeting if len(processes) > 1 else {}) | (environment or {})])
        for process in processes:
            print(message, file=process, flush=True)
        self.pid, *_ = [int(process.readline()) for process in processes]

    def kill(self) -> None:
        """`kill -9` of the only child."""
        os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> int:
        """The exit status, or minus the signal that ended it; of several children the first that is not 0."""
        statuses = [int(process.readline()) for process in self.processes]
        return next((status for status in statuses if status), 0)
