"""The content of a folder exchanged for another so that a process that is killed loses nothing of either.

The new content is in `FOLDER/.stepfuse-replace/new`, on the same filesystem, and is moved into position file by file,
while the files that it replaces are kept in `.stepfuse-replace/old`. A plan of the moves, written before the first of
them, lets any later process complete a replacement that was interrupted, `kill -9` included; an error undoes it.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from stepfuse.data.folder_files import check_replaceable, delete_empty_parents, files_below
from stepfuse.data.json_file import write_json

WORK = ".stepfuse-replace"
NEW, OLD, PLAN = "new", "old", "plan.json"


def swap(output: Path, folder: Path, old_files: Sequence[Path]) -> None:
    """Move the old files out and the new ones in; an error undoes both."""
    work = folder / WORK
    old = [file for file in old_files if os.path.lexists(folder / file)]
    new = sorted(files_below(work / NEW, *os.listdir(work / NEW)))
    for file in new:
        check_replaceable(output, folder, file, set(old))
    (work / OLD).mkdir()
    plan = {"old": [str(file) for file in old], "new": [str(file) for file in new]}
    write_json(work / PLAN, plan)
    try:
        _forward(folder, old, new)
    except BaseException:
        _back(folder, old, new)
        (work / PLAN).unlink()
        raise
    (work / PLAN).unlink()


def _forward(folder: Path, old: Sequence[PurePath], new: Sequence[PurePath]) -> None:
    """Continue the swap from wherever it stopped."""
    work = folder / WORK
    for file in old:
        replaced_already = file in new and not os.path.lexists(work / NEW / file)
        if not replaced_already and not os.path.lexists(work / OLD / file) and os.path.lexists(folder / file):
            _move(folder / file, work / OLD / file)
    delete_empty_parents(folder, old)
    for file in new:
        if os.path.lexists(work / NEW / file):
            _move(work / NEW / file, folder / file)


def _back(folder: Path, old: Sequence[PurePath], new: Sequence[PurePath]) -> None:
    """Undo the swap from wherever it stopped."""
    work = folder / WORK
    for file in new:
        if not os.path.lexists(work / NEW / file) and os.path.lexists(folder / file):
            _move(folder / file, work / NEW / file)
    delete_empty_parents(folder, new)
    for file in old:
        if os.path.lexists(work / OLD / file):
            _move(work / OLD / file, folder / file)


def complete_swap(output: Path, folder: Path) -> None:
    """Complete the swap that a plan describes, or undo it where that fails. The folder is locked."""
    work = folder / WORK
    if not (work / PLAN).is_file():
        return
    if any(path.is_symlink() or not path.is_dir() for path in (work, work / NEW, work / OLD)):
        raise ValueError(f"{work} is not as stepfuse writes it; look at its content and delete it")
    try:
        plan = json.loads((work / PLAN).read_text(encoding="utf-8"))
        old, new = ([_relative_path(name) for name in plan[key]] for key in ("old", "new"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{work / PLAN} is not as stepfuse writes it; look at {work} and delete it") from error
    try:
        try:
            _forward(folder, old, new)
        except OSError:
            _back(folder, old, new)
    except OSError as error:
        raise ValueError(
            f"the content of {output} was being replaced when a process ended, and that cannot be completed "
            f"({error.strerror}: {error.filename}); its old files are in {work / OLD}, the new ones in {work / NEW}"
        ) from error
    (work / PLAN).unlink()
    remove(work)


def _relative_path(name: Any) -> PurePath:
    """A path of a plan, which must not lead out of the folder."""
    path = PurePath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or path.parts[0] == WORK:
        raise ValueError(f"path {name!r}")
    return path


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        raise FileExistsError(17, os.strerror(17), str(target))
    os.rename(source, target)


def remove(work: Path) -> None:
    """Delete the temporary folder, whatever it is."""
    if work.is_symlink() or (os.path.lexists(work) and not work.is_dir()):
        work.unlink()
    elif work.is_dir():
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def swap_lock(output: Path, folder: Path, *, seconds: float) -> Iterator[None]:
    """Lock a folder among processes, where the filesystem has locks; the kernel releases it when the process ends.

    Where another process holds it for longer than these seconds, ValueError is raised.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"output {output} is being written by another process; wait for its end or choose another"
                    ) from None
                time.sleep(0.05)
            except OSError:  # network filesystems without locks of folders
                break
        yield
    finally:
        os.close(handle)
