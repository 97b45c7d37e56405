"""Output folders: filled and replaced, never removed.

An output folder may be a mount point, a symbolic link or the working directory, so the folder itself is never deleted
or renamed: its files are exchanged (`stepfuse.data.folder_swap`). Files that stepfuse did not write are never moved or
deleted.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from stepfuse.data.folder_files import check_replaceable, delete_empty_parents, reachable
from stepfuse.data.folder_swap import NEW, PLAN, WORK, complete_swap, remove, swap, swap_lock
from stepfuse.data.output_file import check_parents, output_errors, real_path

NOT_CONTENT = (WORK, "lost+found")  # the second is in the root folder of every ext4 volume
Files = Callable[[Path], Iterable[Path]]  # of a folder, as paths relative to it


def resolve_folder(output: Path) -> Path:
    """The path of an output folder with links and `..` followed; ValueError where none can be made or written."""
    with output_errors(output):
        folder = real_path(output)
        check_parents(output, folder)
    return folder


@contextmanager
def created_folder(output: Path) -> Iterator[Path]:
    """Create an output folder with its parents; if the block raises an error, delete those created that are empty."""
    folder = resolve_folder(output)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with output_errors(output):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        with suppress(OSError):  # a folder that holds something stays
            for path in created:
                path.rmdir()
        raise


def require_empty_dir(
    output: Path,
    *,
    overwrite: bool,
    ours: Files = lambda folder: (),
    writes: Sequence[str] = (),
    besides: Sequence[str] = (),
    option: str = "output",
) -> Path:
    """The resolved path of an output folder that may be written; an interrupted replacement is completed first.

    Args:
        ours: lists the files in a folder that an earlier run of the command wrote, as paths relative to it.
        writes: names that the command will write; files of other origin under these names are refused.
        besides: names that do not count as content.
        option: what the command calls the folder.

    Raises:
        ValueError: for a folder that is not empty, unless `overwrite`, and for files that would be lost.
    """
    folder = resolve_folder(output)
    if not folder.is_dir():
        return folder
    complete_interrupted(output)
    with output_errors(output):
        content = [name for name in os.listdir(folder) if name not in (*NOT_CONTENT, *besides)]
    if content and not overwrite:
        raise ValueError(
            f"{option} {output} exists and is not empty; choose another or pass --overwrite, which replaces files of "
            "stepfuse only (all others stay)"
        )
    if content:
        replaceable = set(ours(folder))
        for name in writes:
            check_replaceable(output, folder, PurePath(name), replaceable)
    return folder


@contextmanager
def atomic_output_dir(
    output: Path, *, ours: Files = lambda folder: (), check: Callable[[Path], Any] | None = None
) -> Iterator[Path]:
    """A temporary folder whose content becomes that of the output folder when the block ends without an error.

    Files listed by `ours` are replaced, all other files stay. Whatever fails, the output is as it was.

    Args:
        ours: lists the files in a folder that are to be replaced, as paths relative to it.
        check: called with the temporary folder before anything of the output is changed.

    Raises:
        ValueError: for an output that cannot be written, is in use by another process, or holds files of other origin
            where new files are to be.
    """
    with created_folder(output) as folder, output_errors(output), swap_lock(output, folder, seconds=0):
        complete_swap(output, folder)
        work = folder / WORK
        try:
            remove(work)
            (work / NEW).mkdir(parents=True)
            yield work / NEW
            if check is not None:
                check(work / NEW)
            swap(output, folder, reachable(folder, ours(folder)))
        finally:
            if not (work / PLAN).exists():  # or the rollback failed too: the next run completes it
                remove(work)


def complete_interrupted(output: Path) -> None:
    """Complete an interrupted replacement of a folder's content; if it fails, ValueError says where the files are."""
    folder = Path(os.path.realpath(output))
    if (folder / WORK / PLAN).is_file():
        with output_errors(output), swap_lock(output, folder, seconds=10):
            complete_swap(output, folder)


def delete_files(output: Path, files: Iterable[Path]) -> None:
    """Delete files of a folder, given as paths relative to it, and the subfolders that become empty."""
    folder = resolve_folder(output)
    with output_errors(output):
        files = reachable(folder, files)
        for file in files:
            (folder / file).unlink(missing_ok=True)
        delete_empty_parents(folder, files)
