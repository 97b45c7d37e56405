"""Files of a set as anybody may have made them: strict JSON, the schema of a manifest, and what may lie in a folder."""

import json
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from stepfuse.data import emoji
from stepfuse.data.text_files import read_text
from stepfuse.fuse.lora.safe_files import _printable, check_no_pickle, one_line, read_object, short

FORMAT_VERSION = 1
MANIFEST = "adapter_set.json"
EMBEDDED_SETS = {"emoji": emoji.ADAPTER_SET}
SCHEMA = Path(__file__).parent / "adapter_set.schema.json"


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object of the current format version.

    Raises:
        ValueError: naming the file.
    """
    values = read_object(file, what)
    check_version(file, values.get("format_version"))
    return values


def check_version(file: Path, version: Any) -> None:
    """See that this version of stepfuse reads that version of the format.

    Raises:
        ValueError: for another, with what to do about it.
    """
    if version == FORMAT_VERSION and isinstance(version, int) and not isinstance(version, bool):
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    remedy = "upgrade: pip install --upgrade stepfuse" if newer else "create it again"
    raise ValueError(f"{file} has format_version {short(version)}; this stepfuse reads {FORMAT_VERSION}; {remedy}")


def check_schema(file: Path, values: Mapping[str, Any]) -> None:
    """See that a manifest is what the schema says.

    Raises:
        ValueError: naming the file, the place and the value.
    """
    error = best_match(_validator().iter_errors(values))
    if error is not None:
        place = ".".join(map(str, error.absolute_path))
        raise ValueError(f"{file} is malformed: {one_line(place) + ': ' if place else ''}{one_line(error.message)}")


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(read_text(SCHEMA)))


def inside(folder: Path, *names: str) -> Path:
    """A place in a set's folder that is there in truth too: a manifest may not point outside, nor may a link.

    The hub's cache keeps files as links to its own `blobs`; those are of the set.

    Raises:
        ValueError: naming what points where it should not.
    """
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
            raise ValueError(f"{folder / MANIFEST}: adapter folder {short(name)}; expected the name of a subfolder")
    place = folder.joinpath(*names)
    _check_link(folder, place)
    return place


def check_files(folder: Path, besides: Collection[Path] = ()) -> None:
    """See that a set's folder holds data alone: no pickle, and no link to elsewhere.

    Args:
        besides: files that are not looked at, as paths relative to the folder.

    Raises:
        ValueError: naming the file at fault.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            place = Path(parent, name)
            if place.relative_to(folder) in besides:
                continue
            check_no_pickle(place)
            if place.is_symlink():
                _check_link(folder, place)


def _check_link(folder: Path, place: Path) -> None:
    """See that a place is in the folder, or in the cache that the folder is of, once its links are followed."""
    homes, place_of = [folder.resolve()], folder.absolute()
    if place_of.parent.name == "snapshots" and place_of.parents[1].name.startswith("models--"):
        # Of the repository, and since huggingface_hub 2 of the whole cache, by their hashes.
        homes += [home.resolve() / "blobs" for home in place_of.parents[1:3]]
    try:
        resolved = place.resolve()
    except (OSError, RuntimeError) as error:  # links in a ring
        raise ValueError(f"{_printable(place)} is a link that leads nowhere; fetch the set again") from error
    if not any(resolved.is_relative_to(home) for home in homes):
        raise ValueError(
            f"{_printable(place)} is a link to {_printable(resolved)}, outside the set; put the file itself there"
        )
