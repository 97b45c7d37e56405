"""Suggestions for folders that were mistyped, or of which one further down was meant."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from stepfuse.data.names import MOST, near_names

LEVELS = 2  # below a folder
LISTED = 2000  # entries in all, of a call: looking at more of them would take long


def near_folders(given: Path, holds: Callable[[Path], bool]) -> list[str]:
    """The few folders that may have been meant by a path that is not what was expected, written as the path is.

    In a folder, these are the ones up to two levels below it. For a path that does not exist, they are those whose
    name is near to the first part that is missing, or within such a folder, or else folders of its name near by.

    Args:
        holds: Whether a folder is what was expected.
    """
    try:
        left = [LISTED]
        found = _below(given, holds, left) if given.is_dir() else _mended(given, holds, left)
    except (OSError, ValueError):  # a path that the system refuses
        return []
    return [str(folder) for folder in found[:MOST]]


def _mended(given: Path, holds: Callable[[Path], bool], left: list[int]) -> list[Path]:
    """For a path that does not exist."""
    parent = next((parent for parent in given.parents if parent.is_dir()), None)
    if parent is None:  # the working directory was deleted
        return []
    missing, *rest = given.relative_to(parent).parts
    near = [parent / name for name in near_names(missing, (folder.name for folder in _folders(parent, left)))]
    there = [folder.joinpath(*rest) for folder in near if holds(folder.joinpath(*rest))]
    if there or rest:
        return there
    inside = [folder for outer in near for folder in _below(outer, holds, left)]
    return inside or _below(parent, lambda folder: folder.name == given.name and holds(folder), left)


def _below(folder: Path, holds: Callable[[Path], bool], left: list[int]) -> list[Path]:
    """The folders that hold what was expected on the first level below a folder that has any."""
    level = [folder]
    for _ in range(LEVELS):
        level = [inner for outer in level for inner in _folders(outer, left)]
        if found := [inner for inner in level if holds(inner)]:
            return found
    return []


def _folders(parent: Path, left: list[int]) -> Iterator[Path]:
    """The folders in a folder, by name, without hidden ones; `left` is how many more entries may be looked at."""
    try:
        entries = sorted(islice(parent.iterdir(), left[0]))
    except OSError:  # one that may not be listed
        return iter(())
    left[0] -= len(entries)
    return (entry for entry in entries if not entry.name.startswith(".") and entry.is_dir())
