"""Environments of workers: made once from a requirements file, and kept."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stepfuse.data.text_files import read_text

COMPLETE = "stepfuse-complete"


def cache_folder() -> Path:
    """`STEPFUSE_CACHE`, by default ~/.cache/stepfuse."""
    given = os.environ.get("STEPFUSE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfuse"


def environment_folder(requirements: Path, python: str | None = None) -> Path:
    """Where the environment of a requirements file lies, made or not: its name changes with the file's text.

    Raises:
        ValueError: for a file that is not there.
    """
    if not requirements.is_file():
        raise ValueError(f"no requirements file {requirements}")
    version = python or ".".join(map(str, sys.version_info[:3]))
    what = "\0".join([read_text(requirements), version, platform.machine()])
    key = hashlib.sha256(what.encode()).hexdigest()[:12]
    return cache_folder() / "environments" / f"{requirements.stem}-{key}"


def environment_python(requirements: Path, python: str | None = None) -> Path:
    """The interpreter of that environment, which is made first if need be: by uv where there is one, else venv and pip.

    One that was begun and not finished is made anew; two processes that want it make one.

    Args:
        requirements: as pip reads it.
        python: of another interpreter than this one: a command such as python3.10, or for uv a version.

    Raises:
        ValueError: where it cannot be made, with the last lines of the log.
    """
    folder = environment_folder(requirements, python)
    interpreter = folder / "bin" / "python"
    if (folder / COMPLETE).is_file() and interpreter.exists():
        return interpreter
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {folder.parent} ({error.strerror}); set STEPFUSE_CACHE to a folder") from error
    with _locked(folder.with_name(folder.name + ".lock")):
        if not ((folder / COMPLETE).is_file() and interpreter.exists()):  # another process may have made it
            _make(folder, requirements, python)
    return interpreter


def _make(folder: Path, requirements: Path, python: str | None) -> None:
    log = folder.with_name(folder.name + ".log")
    print(f"making the environment of {requirements} once: {folder} (log: {log})", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    uv = shutil.which("uv")
    if uv:
        commands = [
            [uv, "venv", "--python", python or sys.executable, str(folder)],
            [uv, "pip", "install", "--python", str(folder / "bin" / "python"), "-r", str(requirements)],
        ]
    else:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        commands = [
            [python or sys.executable, "-m", "venv", str(folder)],
            [*pip, "install", "--no-compile", "-r", str(requirements)],  # most of it is never imported
        ]
    # What this environment's variables point to is not in the worker's.
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with open(log, "w+b") as output:
        for command in commands:
            try:
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables
                )
                status = f"exit status {done.returncode}" if done.returncode else ""
            except OSError as error:
                status = str(error)
            if status:
                shutil.rmtree(folder, ignore_errors=True)
                raise ValueError(
                    f"the environment of {requirements} could not be made: {' '.join(command[:4])} … ended with "
                    f"{status}; {last_lines(output)} (log: {log})"
                )
    (folder / COMPLETE).touch()


def last_lines(log: IO[bytes], count: int = 4) -> str:
    """The end of a log, on one line."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    text = log.read().decode(errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return f"its last output: {' | '.join(lines[-count:])[-600:]}" if lines else "it printed nothing"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among processes; a lock ends with the process that holds it."""
    with open(file, "wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
