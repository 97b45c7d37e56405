"""Commands as a user of an environment types them, with their output in a log."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

SUPERVISOR = Path(__file__).parents[1] / "recipes" / "supervisor.py"
TAIL = 25  # lines of the log that are shown for a command that failed
KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TMPDIR")


class CommandFailed(ValueError):
    """A command of the check ended with another status than expected, or left something else behind."""


@dataclass(frozen=True, kw_only=True)
class Shell:
    """Runs commands in a folder, and keeps what they print.

    Attributes:
        folder: in which they run.
        log: to which their output is added.
        environment: all variables that they see.
    """

    folder: Path
    log: Path
    environment: Mapping[str, str]

    def run(self, command: str | Sequence[str]) -> str:
        """What a command prints to standard output; CommandFailed for an exit status other than 0.

        The command and the processes that it started end with this process, even if this one is killed.
        """
        words = shlex.split(command) if isinstance(command, str) else list(command)
        self.note(f"$ {shlex.join(words)}")
        supervised = [sys.executable, "-P", str(SUPERVISOR), *words]
        output = self.log.with_suffix(".stdout")
        process: subprocess.Popen[bytes] | None = None
        with open(output, "wb") as stdout, open(self.log, "ab") as stderr:
            try:
                with signals_held():
                    process = subprocess.Popen(
                        supervised,
                        cwd=self.folder,
                        env=self.environment,
                        stdin=subprocess.PIPE,  # closes when this process ends: the supervisor then ends the command
                        stdout=stdout,
                        stderr=stderr,
                        start_new_session=True,
                    )
                status = process.wait()
            finally:
                if process is not None:
                    assert process.stdin is not None
                    process.stdin.close()
                    process.wait()
        printed = output.read_text(encoding="utf-8", errors="replace")
        output.unlink()
        self.note(printed)
        if status:
            raise CommandFailed(f"`{shorten(shlex.join(words), 160)}` ended with status {status}")
        return printed

    def note(self, text: str) -> None:
        """Add lines to the log."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{text.rstrip()}\n" if text.strip() else "")

    def tail(self, start: int) -> list[str]:
        """The last lines of what was added to the log after its first `start` bytes."""
        with open(self.log, "rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace").rstrip()
        # A progress bar is one line, of which the last state counts.
        return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")[-TAIL:]]


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while a process is started: by an exception in `Popen` it would be lost."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in received[:1]:
            signal.raise_signal(each)


def clean_environment(programs: Path, home: Path) -> dict[str, str]:
    """The variables of a user who has this folder of programs first in PATH, an empty home, and no access to the hub.

    Nothing that this process was started with leads to the checkout: no PYTHONPATH, and no configuration of a library.
    """
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    path = os.pathsep.join([str(programs), "/usr/local/bin", "/usr/bin", "/bin"])
    return kept | {"PATH": path, "HOME": str(home), "HF_HUB_OFFLINE": "1"}
