"""Files of a set as anybody may have made them: strict JSON, the schema of a manifest, and what may lie in a folder."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from stepfuse.data.output_folder import written_file
from stepfuse.data.text_files import decode_text, read_text, write_text

FORMAT_VERSION = 1
MANIFEST = "adapter_set.json"
WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEMA = Path(__file__).parent / "adapter_set.schema.json"
MOST_BYTES = 2**24  # of a JSON file
MOST_VALUES = 2**16  # in it: the schema is not asked of more
MOST_LEVELS = 32
# What torch, numpy and others unpickle, which runs whatever its author wanted.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".p", ".npy", ".npz", ".joblib", ".dill", ".h5")


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write aside and rename: a reader never sees half a file."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    with written_file(file) as temporary:
        write_text(temporary, text)


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object of the current format version.

    Raises:
        ValueError: naming the file.
    """
    values = read_object(file, what)
    check_version(file, values.get("format_version"))
    return values


def read_object(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object, strictly: no NaN, no key twice, no number beyond float64.

    Raises:
        ValueError: naming the file.
    """
    if not file.is_file():
        raise ValueError(f"no {file.name} in {file.parent}; expected {what}")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; expected {what}, of {MOST_BYTES:,} at most")
    try:
        values = json.loads(
            decode_text(file.read_bytes(), "it"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    _check_size(file, values)
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


def check_no_pickle(place: PurePath) -> None:
    """See that a file is no pickle, by its name.

    Raises:
        ValueError: naming it.
    """
    if place.suffix.lower() in PICKLES:
        raise ValueError(
            f"{_printable(place)} is a pickle or may be one, which can run code when it is read; expected safetensors "
            "only: delete it, or convert it"
        )


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        often = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {short(next(key for key in often if often[key] > 1))} comes twice")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}… is too large a number")
    return int(text)


def _check_size(file: Path, values: dict[str, Any]) -> None:
    """See that values are few and not nested deeply: what looks at them further takes its time, or recurses."""
    level: list[Any] = [values]
    count = depth = 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > MOST_VALUES or depth > MOST_LEVELS:
            raise ValueError(f"{file} has more than {MOST_VALUES:,} values, or more than {MOST_LEVELS} levels of them")
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        level = [value for values in inner for value in values]


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))


def one_line(error: object) -> str:
    """A text in one line, printable and not too long."""
    text = str(error)
    text = text if len(text) <= 1000 else f"{text[:700]} … {text[-290:]}"
    text = " ".join(_printable(text).split())
    return text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"


def short(value: Any) -> str:
    """A value as code, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
