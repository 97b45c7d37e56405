"""The lock of a folder that a run writes to for minutes or hours. Importing this does not import torch."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stepfuse.data.main_process import is_main_process
from stepfuse.data.output_file import output_errors
from stepfuse.data.output_folder import created_folder, require_empty_dir, resolve_folder
from stepfuse.data.text_files import write_text

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder on the main process while a run writes to it; the kernel unlocks it when the process ends.

    Raises:
        ValueError: if another process holds the lock, or the folder cannot be written to.
    """
    if not is_main_process():
        yield
        return
    with created_folder(folder):
        lock = _acquired(folder)
        try:
            write_text(folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            lock.release()


def check_free(folder: Path, *, empty: bool) -> None:
    """Raise ValueError early for a folder that the run will refuse: in use by another run, or with `empty` not empty.

    Nothing is created, and no lock is held afterwards, so the run itself checks again.
    """
    if not is_main_process():
        return
    resolved = resolve_folder(folder)
    with output_errors(folder):
        in_use = (resolved / LOCK).is_file()
    if in_use:
        _acquired(folder).release()
    if empty:
        require_empty_dir(folder, overwrite=False, besides=(LOCK,), option="--output_dir")


def _acquired(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(
            f"{folder} is in use by {holder or 'another run'}; wait until it ends or choose another --output_dir"
        ) from None
    except OSError as error:
        raise ValueError(f"output {folder} cannot be written to: {error.strerror}; choose another") from error
    return lock
