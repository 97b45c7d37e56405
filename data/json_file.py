"""JSON files as anybody may have made them: read strictly and within bounds, written whole."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepfuse.data.output_file import atomic_file
from stepfuse.data.text_files import decode_text, one_line, short_repr, write_text

MAX_BYTES = 2**24
MAX_VALUES = 2**16  # a schema is checked in time that grows with them
MAX_LEVELS = 32


def write_json(file: Path, values: Mapping[str, Any], *, indent: int = 2, sort_keys: bool = False) -> None:
    """Write a JSON object whole or not at all; ValueError if it cannot be written, or holds NaN or infinity."""
    text = json.dumps(values, indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n"
    with atomic_file(file) as temporary:
        write_text(temporary, text)


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object, bounded in size and depth, or raise ValueError that names the file and what it should be."""
    try:
        if not file.is_file():
            raise ValueError(f"no {file.name} in {file.parent}; expected {what}")
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes; expected {what}, of {MAX_BYTES:,} at most")
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; expected {what}") from error
    try:
        values = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    return values


def parse_json(data: bytes, max_values: int = MAX_VALUES) -> Any:
    """Parse JSON strictly, or raise ValueError.

    It must be UTF-8 without NaN and Infinity, no key twice, no number beyond float64, and few values and levels.
    """
    try:
        values = json.loads(
            decode_text(data, "it"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_size(values, max_values)
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {short_repr(next(key for key in counts if counts[key] > 1))} comes twice")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"it holds {text}; NaN and Infinity are not valid JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}… is too large a number")
    return int(text)


def _check_size(values: Any, max_values: int) -> None:
    level: list[Any] = [values]
    count = depth = 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > max_values or depth > MAX_LEVELS:
            raise ValueError(f"it has more than {max_values:,} values, or more than {MAX_LEVELS} levels of them")
        members = [inner for value in level if isinstance(value, dict) for inner in value.values()]
        items = [inner for value in level if isinstance(value, list) for inner in value]
        level = members + items
