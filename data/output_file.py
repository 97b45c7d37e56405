"""Output files: refused before work goes into them, and replaced whole or not at all."""

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def require_new_file(output: Path, *, overwrite: bool, option: str = "--output") -> Path:
    """The path of a file to be written, with links followed.

    Raises:
        ValueError: for one that exists, unless `overwrite`; for a folder; for a path below a file.
    """
    with output_errors(output):
        file = real_path(output)
        if file.is_dir():
            raise ValueError(f"{option} {output} is a folder; expected the name of a file")
        if os.path.lexists(file) and not overwrite:
            raise ValueError(f"{option} {output} exists; choose another {option} or pass --overwrite")
        if not file.exists() or file.is_file():  # devices need no file beside them
            check_parents(output, file.parent)
    return file


def unused_path(path: Path, ending: str = "") -> Path:
    """This path, or with a number before its ending the first that does not exist: `out-2.png` for `out.png`."""
    stem = path.name.removesuffix(ending)
    numbered = (path.with_name(f"{stem}-{number}{ending}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not os.path.lexists(each))


@contextmanager
def atomic_file(output: Path) -> Iterator[Path]:
    """A temporary file beside the output, with the same ending, that replaces it when the block ends without an error.

    A link is followed, and its target replaced. What is no regular file, such as /dev/stdout, is written directly.

    Raises:
        ValueError: where it cannot be written; the earlier file stays.
    """
    with output_errors(output):
        file = real_path(output)
        if os.path.lexists(file) and not file.is_file() and not file.is_dir():
            yield Path(output)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(file)
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


def temporary_name(file: Path) -> Path:
    """Where `atomic_file` writes before it renames: a file left there by a process that was killed is overwritten."""
    return file.with_name(f".{file.stem[:200]}.tmp{file.suffix}")


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn errors of the file system into a ValueError of one line that names the output."""
    try:
        yield
    except OSError as error:
        other = str(error.filename or "")
        named = f" ({other})" if other and other != str(output) else ""
        raise ValueError(f"output {output} cannot be written: {error.strerror or error}{named}") from error


def real_path(output: Path) -> Path:
    """The path with links followed; a folder that `..` leads back from has to exist, as for the system's own calls."""
    for path in [output, *output.parents]:
        if path.name == ".." and not path.parent.is_dir():
            raise ValueError(f"output {output}: there is no folder {path.parent}; choose another")
    return Path(os.path.realpath(output))


def check_parents(output: Path, folder: Path) -> None:
    """Check that files can be made in a folder of an output, or that the folder can be made."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir() or os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"output {output}: {existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output {output} cannot be written: {existing} is read-only for this user; choose another")
