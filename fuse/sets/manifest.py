"""The untrusted files of a set: strict JSON, the schema of a manifest, and which files a folder may hold."""

import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from stepfuse.data import emoji
from stepfuse.data.json_file import read_json
from stepfuse.data.kl_steps import KL_PICTURE
from stepfuse.data.output_folder import complete_interrupted
from stepfuse.data.text_files import one_line, short_repr, without_control_characters
from stepfuse.fuse.lora.safe_files import check_no_pickle

FORMAT_VERSION = 1
MANIFEST = "adapter_set.json"
OBJECTIVE = "objective.json"  # in the folder of an adapter, as training writes it
CARD, FRONTS, STRIP = "README.md", "fronts.png", "strip.png"  # beside the manifest, where there are some
SHOWN = (CARD, FRONTS, STRIP, KL_PICTURE)
EMBEDDED_SETS = dict(emoji.ADAPTER_SETS)
SCHEMA = Path(__file__).parent / "adapter_set.schema.json"


def read_versioned(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object of the current format version; a ValueError says what to do about another one."""
    values = read_json(file, what)
    version = values.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:
        return values
    newer = isinstance(version, int) and version > FORMAT_VERSION
    remedy = "upgrade: pip install --upgrade stepfuse" if newer else "create it again"
    raise ValueError(f"{file} has format_version {short_repr(version)}; this stepfuse reads {FORMAT_VERSION}; {remedy}")


def check_writable(folder: str | Path) -> Path:
    """The folder of a set whose manifest can be written; ValueError for another set."""
    file = Path(folder, MANIFEST)
    complete_interrupted(file.parent)
    if not file.exists():
        raise ValueError(f"set {str(folder)!r} is not in a folder; `stepfuse pull {folder} FOLDER` copies it to one")
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written; copy the set to another folder")
    return file.parent


def check_schema(file: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the keys and the value, for a manifest that does not follow its schema."""
    error = best_match(_validator().iter_errors(values))
    if error is not None:
        keys = ".".join(map(str, error.absolute_path))
        raise ValueError(f"{file} is malformed: {one_line(keys) + ': ' if keys else ''}{one_line(error.message)}")


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(read_json(SCHEMA, "the schema of a manifest"))


def adapter_entries(values: Mapping[str, Any]) -> list[Any]:
    """The entries of the adapters of a manifest, and then of its oracles."""
    return [*values["adapters"], *(oracle["adapter"] for oracle in values.get("oracles", []))]


def check_path_in_set(folder: Path, *names: str) -> Path:
    """A path in a set's folder; ValueError for a name or a link that points to elsewhere.

    The hub's cache keeps files as links to its own `blobs`; those are of the set.
    """
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
            raise ValueError(
                f"{folder / MANIFEST}: adapter folder {short_repr(name)}; expected the name of a subfolder"
            )
    path = folder.joinpath(*names)
    _check_link(folder, path)
    return path


def check_files(folder: Path, besides: Collection[Path] = ()) -> None:
    """Raise ValueError for a pickle or a link to elsewhere in a folder, besides these paths relative to it."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.relative_to(folder) in besides:
                continue
            check_no_pickle(path)
            if path.is_symlink():
                _check_link(folder, path)


def _check_link(folder: Path, path: Path) -> None:
    """Raise ValueError unless a path is in the folder, or in the cache that it is of, once its links are followed."""
    allowed, absolute = [folder.resolve()], folder.absolute()
    if absolute.parent.name == "snapshots" and absolute.parents[1].name.startswith("models--"):
        # Of the repository, and since huggingface_hub 2 of the whole cache, by their hashes.
        allowed += [cache.resolve() / "blobs" for cache in absolute.parents[1:3]]
    name = without_control_characters(path)
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a ring
        raise ValueError(f"{name} is a link that leads nowhere; fetch the set again") from error
    if not any(resolved.is_relative_to(parent) for parent in allowed):
        target = without_control_characters(resolved)
        raise ValueError(f"{name} is a link to {target}, outside the set; put the file itself there")
