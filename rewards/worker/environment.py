"""Python environments of workers, created once per requirements file and cached."""

import os
import platform
import shutil
import sys
from pathlib import Path
from subprocess import DEVNULL, STDOUT, CalledProcessError, run
from typing import IO

from filelock import FileLock

from stepfuse.data.file_info import text_hash
from stepfuse.data.text_files import read_text

COMPLETE = "stepfuse-complete"


def environment_folder(requirements: Path, python: str | None = None) -> Path:
    """The folder of the environment of a requirements file, which need not exist yet.

    It is in STEPFUSE_CACHE, by default ~/.cache/stepfuse, and its name contains a hash of the requirements, the version
    of Python, and the machine's architecture. If the requirements file is missing, ValueError is raised.
    """
    version = python or platform.python_version()
    key = text_hash("\0".join([read_text(requirements), version, platform.machine()]))[:12]
    cache = os.environ.get("STEPFUSE_CACHE")
    root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfuse"
    return root / "environments" / f"{requirements.stem}-{key}"


def is_complete(folder: Path) -> bool:
    """Whether an environment exists and has all its packages."""
    return (folder / COMPLETE).is_file() and (folder / "bin" / "python").exists()


def environment_python(requirements: Path, python: str | None = None) -> Path:
    """Return the interpreter of the environment of a requirements file, and create the environment if it is missing.

    It is created with uv if uv is installed, otherwise with venv and pip. An incomplete environment is created again,
    and a lock prevents two processes from creating it at the same time. `python` is the interpreter: a command such as
    python3.10, or a version if uv is installed.

    Raises:
        ValueError: If the environment cannot be created. The message contains the end of the log.
    """
    folder = environment_folder(requirements, python)
    if not is_complete(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot create {folder.parent} ({error.strerror})"
            raise ValueError(f"{reason}; set STEPFUSE_CACHE to a folder") from error
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not is_complete(folder):  # another process may have created it
                _create(folder, requirements, python)
    return folder / "bin" / "python"


def _create(folder: Path, requirements: Path, python: str | None) -> None:
    log = folder.with_name(folder.name + ".log")
    print(f"creating the environment of {requirements} once: {folder} (log: {log})", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    uv, interpreter = shutil.which("uv"), str(folder / "bin" / "python")
    if uv:
        commands = [
            [uv, "venv", "--python", python or sys.executable, str(folder)],
            [uv, "pip", "install", "--python", interpreter, "-r", str(requirements)],
        ]
    else:
        pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        commands = [
            [python or sys.executable, "-m", "venv", str(folder)],
            [*pip, "install", "--no-compile", "-r", str(requirements)],  # most modules are never imported
        ]
    # These variables point to modules of this environment, which the worker must not import.
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with open(log, "w+b") as output:
        try:
            for command in commands:
                run(command, stdout=output, stderr=STDOUT, stdin=DEVNULL, env=variables, check=True)
        except (OSError, CalledProcessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(
                f"cannot create the environment of {requirements}: {error}; {last_lines(output)} (log: {log})"
            ) from error
    (folder / COMPLETE).touch()


def last_lines(log: IO[bytes], count: int = 4) -> str:
    """The last lines of a log, joined to one line."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    text = log.read().decode(errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return f"its last output: {' | '.join(lines[-count:])[-600:]}" if lines else "it printed nothing"
