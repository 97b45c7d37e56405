"""Python environments of workers, created once per requirements file and cached."""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stepfuse.data.file_info import text_hash
from stepfuse.data.text_files import read_text

COMPLETE = "stepfuse-complete"


def cache_folder() -> Path:
    """The folder named by the environment variable STEPFUSE_CACHE, by default ~/.cache/stepfuse."""
    folder = os.environ.get("STEPFUSE_CACHE")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfuse"


def environment_folder(requirements: Path, python: str | None = None) -> Path:
    """The folder of the environment of a requirements file, which need not exist yet.

    Its name contains a hash of the file's text, the version of Python, and the machine's architecture.

    Raises:
        ValueError: If the requirements file is missing.
    """
    if not requirements.is_file():
        raise ValueError(f"no requirements file {requirements}")
    version = python or ".".join(map(str, sys.version_info[:3]))
    identity = "\0".join([read_text(requirements), version, platform.machine()])
    key = text_hash(identity)[:12]
    return cache_folder() / "environments" / f"{requirements.stem}-{key}"


def environment_python(requirements: Path, python: str | None = None) -> Path:
    """Return the interpreter of the environment of a requirements file, and create the environment if it is missing.

    It is created with uv if uv is installed, otherwise with venv and pip. An incomplete environment is created again,
    and a lock prevents two processes from creating it at the same time.

    Args:
        requirements: A requirements file of pip.
        python: Another interpreter: a command such as python3.10, or a version if uv is installed.

    Raises:
        ValueError: If the environment cannot be created. The message contains the end of the log.
    """
    folder = environment_folder(requirements, python)
    interpreter = folder / "bin" / "python"
    if (folder / COMPLETE).is_file() and interpreter.exists():
        return interpreter
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create {folder.parent} ({error.strerror}); set STEPFUSE_CACHE to a folder") from error
    with _file_lock(folder.with_name(folder.name + ".lock")):
        if not ((folder / COMPLETE).is_file() and interpreter.exists()):  # another process may have created it
            _create(folder, requirements, python)
    return interpreter


def _create(folder: Path, requirements: Path, python: str | None) -> None:
    log = folder.with_name(folder.name + ".log")
    print(f"creating the environment of {requirements} once: {folder} (log: {log})", file=sys.stderr, flush=True)
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
            [*pip, "install", "--no-compile", "-r", str(requirements)],  # most modules are never imported
        ]
    # These variables point to modules of this environment, which the worker must not import.
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
                    f"cannot create the environment of {requirements}: {' '.join(command[:4])} … failed with "
                    f"{status}; {last_lines(output)} (log: {log})"
                )
    (folder / COMPLETE).touch()


def last_lines(log: IO[bytes], count: int = 4) -> str:
    """The last lines of a log, joined to one line."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    text = log.read().decode(errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return f"its last output: {' | '.join(lines[-count:])[-600:]}" if lines else "it printed nothing"


@contextmanager
def _file_lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock among processes. The system releases it when the process ends."""
    with open(file, "wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
