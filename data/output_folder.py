"""Output folders and files: filled and replaced, never removed.

An output folder may be a mount point, a symbolic link or the working directory, so the folder itself is never deleted
or renamed. Its new content is written into `FOLDER/.stepfuse-replace/new`, which is on the same filesystem, and then
moved into position file by file, while the files that it replaces are kept in `.stepfuse-replace/old`. A plan of the
moves, written before the first of them, lets any later process complete a replacement that was interrupted, `kill -9`
included; an error undoes it. Files that stepfuse did not write are never moved or deleted.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

WORK = ".stepfuse-replace"
NEW, OLD, PLAN = "new", "old", "plan.json"
NO_CONTENT = (WORK, "lost+found")  # the second is in the root folder of every ext4 volume
Files = Callable[[Path], Iterable[Path]]


def no_files(folder: Path) -> Iterable[Path]:
    """The `ours` of a command whose output is never in a folder that holds something."""
    return ()


def resolve_folder(output: Path) -> Path:
    """The path of an output folder with links and `..` followed; it need not exist.

    Raises:
        ValueError: for a path that is a file or lies below one, or cannot be written.
    """
    with explained(output):
        folder = _real_path(output)
        for place in (folder, *folder.parents):
            if place.is_dir():
                _check_access(output, place)
                return folder
            if os.path.lexists(place):
                raise ValueError(
                    f"output {output} is a file; choose another"
                    if place == folder
                    else f"output {output}: {place} is not a folder; choose another"
                )
    return folder


def check_output(
    output: Path,
    *,
    overwrite: bool,
    ours: Files = no_files,
    writes: Sequence[str] = (),
    besides: Sequence[str] = (),
) -> Path:
    """Check that an output folder may be written: it is missing or empty, or with `overwrite` holds nothing in the way.

    A replacement that was interrupted is completed first.

    Args:
        ours: lists the files in a folder that an earlier run of the command wrote, as paths relative to it.
        writes: names that the command will write; files of other origin under these names are refused.
        besides: names that do not count as content.

    Returns:
        The resolved path of the folder.

    Raises:
        ValueError: for a folder that is not empty, unless `overwrite`, and for files that would be lost.
    """
    folder = resolve_folder(output)
    if not folder.is_dir():
        return folder
    complete(output)
    with explained(output):
        content = [name for name in os.listdir(folder) if name not in (*NO_CONTENT, *besides)]
    if content and not overwrite:
        raise ValueError(f"output {output} exists and is not empty; choose another or pass --overwrite")
    if content:
        own = set(ours(folder))
        for name in writes:
            _check_foreign(output, folder, PurePath(name), own)
    return folder


@contextmanager
def replaced(output: Path, *, ours: Files = no_files, check: Callable[[Path], Any] | None = None) -> Iterator[Path]:
    """A temporary folder whose content becomes that of the output folder when the block ends without an error.

    Files listed by `ours` are replaced, all other files stay. Whatever fails, the output is as it was.

    Args:
        ours: lists the files in a folder that are to be replaced, as paths relative to it.
        check: called with the temporary folder before anything of the output is changed.

    Raises:
        ValueError: for an output that cannot be written, is in use by another process, or holds files of other origin
            where new files are to be.
    """
    folder = resolve_folder(output)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with explained(output):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(output, folder, seconds=0):
                _complete(output, folder)
                work = folder / WORK
                try:
                    _remove(work)
                    (work / NEW).mkdir(parents=True)
                    yield work / NEW
                    if check is not None:
                        check(work / NEW)
                    _swap(output, folder, _reachable(folder, ours(folder)))
                finally:
                    if not (work / PLAN).exists():  # or the rollback failed too: the next run completes it
                        _remove(work)
    except BaseException:
        with suppress(OSError):  # a folder that holds something stays
            for place in made:
                place.rmdir()
        raise


def complete(output: Path) -> None:
    """Complete a replacement of a folder's content that was interrupted, if there is one.

    Raises:
        ValueError: where it cannot be completed; it says where the files are.
    """
    folder = Path(os.path.realpath(output))
    if (folder / WORK / PLAN).is_file():
        with explained(output), _locked(output, folder, seconds=10):
            _complete(output, folder)


def clear(output: Path, files: Iterable[Path]) -> None:
    """Delete files of a folder, given as paths relative to it, and the subfolders that become empty.

    Raises:
        ValueError: for a file that cannot be deleted.
    """
    folder = resolve_folder(output)
    with explained(output):
        files = _reachable(folder, files)
        for file in files:
            (folder / file).unlink(missing_ok=True)
        _prune(folder, files)


def files_named(folder: Path, *names: str | Path) -> set[Path]:
    """Those of some files that exist in a folder, and their temporaries, as paths relative to the folder."""
    both = {own for name in names for own in (Path(name), temporary_of(Path(name)))}
    return {own for own in both if os.path.lexists(folder / own) and not (folder / own).is_dir()}


def files_below(folder: Path, *names: str) -> set[Path]:
    """All files of some subfolders, or the files themselves, as paths relative to the folder; no link is followed."""
    found = set()
    for name in names:
        place = folder / name
        if place.is_dir() and not place.is_symlink():
            for parent, folders, files in os.walk(place):
                links = [own for own in folders if Path(parent, own).is_symlink()]
                found |= {Path(parent, own).relative_to(folder) for own in (*files, *links)}
        elif os.path.lexists(place):
            found.add(Path(name))
    return found


def check_file(output: Path, *, overwrite: bool, option: str = "--output") -> Path:
    """Check that a file may be written.

    Returns:
        Its path with links followed.

    Raises:
        ValueError: for one that exists, unless `overwrite`; for a folder; for a path below a file.
    """
    with explained(output):
        file = _real_path(output)
        if file.is_dir():
            raise ValueError(f"output {output} is a folder; expected the name of a file")
        if os.path.lexists(file) and not overwrite:
            raise ValueError(f"{output} exists; choose another {option} or pass --overwrite")
        for place in file.parents:
            if os.path.lexists(place):
                if not place.is_dir():
                    raise ValueError(f"output {output}: {place} is not a folder; choose another")
                if not file.exists() or file.is_file():  # devices need no file beside them
                    _check_access(output, place)
                break
    return file


@contextmanager
def written_file(output: Path) -> Iterator[Path]:
    """A temporary file beside the output, with the same ending, that replaces it when the block ends without an error.

    A link is followed, and its target replaced. What is no regular file, such as /dev/stdout, is written directly.

    Raises:
        ValueError: where it cannot be written; what was there stays.
    """
    with explained(output):
        file = _real_path(output)
        if os.path.lexists(file) and not file.is_file() and not file.is_dir():
            yield Path(output)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(file)
        try:
            yield temporary
            if file.is_file():
                with suppress(OSError):
                    shutil.copymode(file, temporary)
            os.replace(temporary, file)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def temporary_of(file: Path) -> Path:
    """The name that `written_file` writes a file under: one left by a process that was killed is written anew."""
    return file.with_name(f".{file.stem[:200]}.tmp{file.suffix}")


@contextmanager
def explained(output: Path) -> Iterator[None]:
    """Errors of the file system as one line that names the output.

    Raises:
        ValueError: for any of them.
    """
    try:
        yield
    except OSError as error:
        other = str(error.filename or "")
        named = f" ({other})" if other and other != str(output) else ""
        raise ValueError(f"output {output} cannot be written: {error.strerror or error}{named}") from error
    except Exception as error:  # safetensors has an error of its own, without a number
        if type(error).__name__ != "SafetensorError" or "Error while serializing" not in str(error):
            raise
        raise ValueError(f"output {output} cannot be written: {' '.join(str(error).split())}") from error


def _real_path(output: Path) -> Path:
    """The path with links followed; a folder that `..` leads back from has to exist, as for the system's own calls."""
    for place in [output, *output.parents]:
        if place.name == ".." and not place.parent.is_dir():
            raise ValueError(f"output {output}: there is no folder {place.parent}; choose another")
    return Path(os.path.realpath(output))


def _check_access(output: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output {output} cannot be written: {folder} is read-only for this user; choose another")


# Swapping ---------------------------------------------------------------------------------------


def _swap(output: Path, folder: Path, own: Sequence[Path]) -> None:
    """Move the old files out and the new ones in; an error undoes both."""
    work = folder / WORK
    old = [file for file in own if os.path.lexists(folder / file)]  # those that are there
    new = sorted(files_below(work / NEW, *os.listdir(work / NEW)))
    for file in new:
        _check_foreign(output, folder, file, set(old))
    (work / OLD).mkdir()
    plan = {"old": [str(file) for file in old], "new": [str(file) for file in new]}
    (work / f"{PLAN}.tmp").write_text(json.dumps(plan), encoding="utf-8")
    os.replace(work / f"{PLAN}.tmp", work / PLAN)
    try:
        _forward(folder, old, new)
    except BaseException:
        _back(folder, old, new)
        (work / PLAN).unlink()
        raise
    (work / PLAN).unlink()


def _forward(folder: Path, old: Sequence[PurePath], new: Sequence[PurePath]) -> None:
    """Bring the swap to its end from wherever it stopped."""
    work = folder / WORK
    for file in old:
        replaced_already = file in new and not os.path.lexists(work / NEW / file)
        if not replaced_already and not os.path.lexists(work / OLD / file) and os.path.lexists(folder / file):
            _move(folder / file, work / OLD / file)
    _prune(folder, old)
    for file in new:
        if os.path.lexists(work / NEW / file):
            _move(work / NEW / file, folder / file)


def _back(folder: Path, old: Sequence[PurePath], new: Sequence[PurePath]) -> None:
    """Undo the swap from wherever it stopped."""
    work = folder / WORK
    for file in new:
        if not os.path.lexists(work / NEW / file) and os.path.lexists(folder / file):
            _move(folder / file, work / NEW / file)
    _prune(folder, new)
    for file in old:
        if os.path.lexists(work / OLD / file):
            _move(work / OLD / file, folder / file)


def _complete(output: Path, folder: Path) -> None:
    """Complete the swap that a plan describes, or undo it where that fails. The folder is locked."""
    work = folder / WORK
    if not (work / PLAN).is_file():
        return
    if any(place.is_symlink() or not place.is_dir() for place in (work, work / NEW, work / OLD)):
        raise ValueError(f"{work} is not as stepfuse writes it; look at its content and delete it")
    try:
        plan = json.loads((work / PLAN).read_text(encoding="utf-8"))
        old, new = ([_inside(name) for name in plan[key]] for key in ("old", "new"))
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
    _remove(work)


def _inside(name: Any) -> PurePath:
    """A path of a plan, which must stay below the folder."""
    path = PurePath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or path.parts[0] == WORK:
        raise ValueError(f"path {name!r}")
    return path


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        raise FileExistsError(17, os.strerror(17), str(target))
    os.rename(source, target)


def _reachable(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Without those that a link leads to, which are of another folder."""
    return [f for f in sorted(set(files)) if not any((folder / parent).is_symlink() for parent in f.parents[:-1])]


def _prune(folder: Path, files: Iterable[PurePath]) -> None:
    """Delete the subfolders of these files that are empty, deepest first."""
    parents = {parent for file in files for parent in file.parents if parent.parts}
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        if not (folder / parent).is_symlink():
            with suppress(OSError):
                (folder / parent).rmdir()


def _check_foreign(output: Path, folder: Path, file: PurePath, own: set[Path]) -> None:
    """Check that a new file may have its name: what is there is ours, or nothing.

    Raises:
        ValueError: naming the file in the way.
    """
    place = None
    for parent in [parent for parent in file.parents if parent.parts]:
        if os.path.lexists(folder / parent) and ((folder / parent).is_symlink() or not (folder / parent).is_dir()):
            place = None if Path(parent) in own else folder / parent
    if place is None and os.path.lexists(folder / file):
        foreign = sorted(files_below(folder, str(file)) - own)
        place = folder / foreign[0] if foreign else None
    if place is not None:
        raise ValueError(
            f"output {output} holds {place.relative_to(folder)}, which is not part of what --overwrite replaces there; "
            "move it, or choose another output"
        )


def _remove(work: Path) -> None:
    """Delete the temporary folder, whatever it is."""
    if work.is_symlink() or (os.path.lexists(work) and not work.is_dir()):
        work.unlink()
    elif work.is_dir():
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(output: Path, folder: Path, *, seconds: float) -> Iterator[None]:
    """Hold a folder among processes; the kernel releases it when the process ends. Where it has no locks, do without.

    Raises:
        ValueError: where another process holds it for longer than some seconds.
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
