"""JSON and file names as anybody may have made them: strict, bounded, and no pickle."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from stepfuse.data.output_folder import written_file
from stepfuse.data.text_files import decode_text, write_text

WEIGHTS = "pytorch_lora_weights.safetensors"  # as `pipe.load_lora_weights` looks for it
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
