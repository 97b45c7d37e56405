"""Files of a folder, as paths relative to it: listed, checked and deleted without following a link to elsewhere."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePath

from stepfuse.data.output_file import temporary_name


def files_named(folder: Path, *names: str | Path) -> set[Path]:
    """Those of some files that exist in a folder, and their temporary files."""
    both = {file for name in names for file in (Path(name), temporary_name(Path(name)))}
    return {file for file in both if os.path.lexists(folder / file) and not (folder / file).is_dir()}


def files_below(folder: Path, *names: str) -> set[Path]:
    """All files of some subfolders, or the files themselves; no link is followed."""
    found = set()
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            for parent, folders, files in os.walk(path):
                links = [inner for inner in folders if Path(parent, inner).is_symlink()]
                found |= {Path(parent, file).relative_to(folder) for file in (*files, *links)}
        elif os.path.lexists(path):
            found.add(Path(name))
    return found


def reachable(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Without those that a link leads to, which are of another folder."""
    return [f for f in sorted(set(files)) if not any((folder / parent).is_symlink() for parent in f.parents[:-1])]


def delete_empty_parents(folder: Path, files: Iterable[PurePath]) -> None:
    """Delete the subfolders of these files that are empty, deepest first."""
    parents = {parent for file in files for parent in file.parents if parent.parts}
    for parent in sorted(parents, key=lambda path: -len(path.parts)):
        if not (folder / parent).is_symlink():
            with suppress(OSError):
                (folder / parent).rmdir()


def check_replaceable(output: Path, folder: Path, file: PurePath, replaceable: set[Path]) -> None:
    """Check that a new file may have its name, or raise ValueError that names a file in the way."""
    obstacle = None
    for parent in [parent for parent in file.parents if parent.parts]:
        if os.path.lexists(folder / parent) and ((folder / parent).is_symlink() or not (folder / parent).is_dir()):
            obstacle = None if Path(parent) in replaceable else folder / parent
    if obstacle is None and os.path.lexists(folder / file):
        others = sorted(files_below(folder, str(file)) - replaceable)
        obstacle = folder / others[0] if others else None
    if obstacle is not None:
        raise ValueError(
            f"output {output} holds {obstacle.relative_to(folder)}, which is not part of what --overwrite replaces "
            "there; move it, or choose another output"
        )
