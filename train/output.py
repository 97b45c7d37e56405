"""The output folder of a run: one run in it at a time, and nothing in it lost."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from stepfuse.data.text_files import write_text
from stepfuse.fuse.adapter import OBJECTIVE
from stepfuse.fuse.make_set import claim_output
from stepfuse.train.checkpoints import list_checkpoints, newest_whole, whole_checkpoint

LOCK = ".lock"
CONFIG = "config.yaml"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while a run writes to it. The kernel lets go of it when the process ends, however it ends.

    Raises:
        ValueError: where another process holds it, or it cannot be written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout:
        with suppress(OSError):
            holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(
            f"{folder} is in use by {holder or 'another run'}; wait for its end or choose another --output_dir"
        ) from None
    except FileExistsError as error:
        raise ValueError(f"output {folder} is a file; choose another") from error
    except OSError as error:
        raise ValueError(f"output {folder} cannot be written to: {error.strerror}; choose another") from error
    try:
        write_text(folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # one that holds something stays
            for place in made:
                place.rmdir()


def find_start(folder: Path, wanted: str | None, *, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; None is the beginning.

    Args:
        wanted: `latest`, a checkpoint's folder by name or path, or None to begin.

    Raises:
        ValueError: for a folder that holds something else, and a checkpoint that is not there or not whole.
    """
    if wanted is None:
        claim_output(folder, overwrite=overwrite, besides=(LOCK,))
        return None
    if wanted != "latest":
        return whole_checkpoint(folder, wanted)
    if newest := newest_whole(folder):
        return newest
    if damaged := list_checkpoints(folder):
        raise ValueError(f"no checkpoint of {folder} is whole: {', '.join(p.name for p in damaged)}; train anew")
    if (folder / OBJECTIVE).exists():
        raise ValueError(f"{folder} holds a finished adapter and no checkpoint to resume from; choose another folder")
    if not (folder / CONFIG).exists():  # not begun by a run
        claim_output(folder, overwrite=overwrite, besides=(LOCK,))
    return None


def clear(folder: Path) -> None:
    """Delete what a folder holds, its lock excepted."""
    for place in folder.iterdir():
        if place.name != LOCK:
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


@contextmanager
def explained_disk(folder: Path) -> Iterator[None]:
    """A disk without room as one line that says what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        words = [os.strerror(code) for code in codes]  # of safetensors, whose errors have no number
        if getattr(error, "errno", None) not in codes and not any(word in str(error) for word in words):
            raise
        raise ValueError(
            f"{folder} cannot be written: {' '.join(str(error).split())}; checkpoints are kept, so make room and go on "
            "with --resume_from_checkpoint latest"
        ) from error
