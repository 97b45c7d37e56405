"""The output folder of a run: one run in it at a time, and nothing in it lost."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from stepfuse.data.folder_files import files_below, files_named
from stepfuse.data.output_folder import delete_files, require_empty_dir, resolve_folder
from stepfuse.data.text_files import write_text
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter import OBJECTIVE
from stepfuse.train.checkpoints import (
    ASIDE,
    MANIFEST,
    OLD,
    POLICY,
    PROGRESS,
    list_checkpoints,
    newest_whole,
    whole_checkpoint,
)

LOCK = ".lock"
CONFIG = "config.yaml"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while a run writes to it. The kernel lets go of it when the process ends, however it ends.

    Raises:
        ValueError: where another process holds it, or it cannot be written to.
    """
    resolved = resolve_folder(folder)
    made = [place for place in (resolved, *resolved.parents) if not place.exists()]
    try:
        resolved.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout:
        with suppress(OSError):
            holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(
            f"{folder} is in use by {holder or 'another run'}; wait for its end or choose another --output_dir"
        ) from None
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
        check_free(folder, overwrite=overwrite)
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
        check_free(folder, overwrite=overwrite)
    return None


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Check that a run may begin in a folder.

    Raises:
        ValueError: for a folder that is not empty, and with `overwrite` for files of other origin that the run would
            replace, or drop as its oldest checkpoints.
    """
    checkpoints = [place.name for place in list_checkpoints(folder)]
    writes = (CONFIG, OBJECTIVE, WEIGHTS, *checkpoints)
    require_empty_dir(folder, overwrite=overwrite, ours=training_files, writes=writes, besides=(LOCK,))


def training_files(folder: Path) -> set[Path]:
    """The files of a run in a folder, which --overwrite replaces; none where there is no run."""
    own = [
        place.name
        for place in list_checkpoints(folder)
        if any((place / name).is_file() for name in (POLICY, PROGRESS, MANIFEST))
    ]
    files = files_below(folder, ASIDE, OLD, *own)
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    begun = isinstance(config, dict) and {"pretrained_model_name_or_path", "output_dir"} <= set(config)
    if begun or (folder / OBJECTIVE).is_file():
        files |= files_named(folder, OBJECTIVE, WEIGHTS, *([CONFIG] if begun else []))
        files |= {file for file in files_below(folder, "samples") if file.match("step-*.png")}
        logs = Path(str(config.get("logging_dir", "logs")) if begun else "logs", "stepfuse")
        if not logs.is_absolute() and ".." not in logs.parts:
            files |= files_below(folder, str(logs))
    return files


def clear(folder: Path) -> None:
    """Delete the files of an earlier run in a folder; all others stay."""
    delete_files(folder, training_files(folder))


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
