"""Data sets of the hub and of local files, and what their cells hold: captions and pictures."""

import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

from stepfuse.data.text_files import file_name, find_file, first_line, short_repr

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def open_data_set(
    source: str, split: str, *, streaming: bool, file: str | None = None, revision: str | None = None
) -> Any:
    """The rows of a data set, as `datasets.load_dataset` returns them, or ValueError for one that cannot be read.

    Args:
        source: a hub data set, a parquet, CSV, JSON or JSON Lines file, or a folder of such files or of images.
        split: of a hub data set or a folder; that of one file is `train`.
        streaming: whether rows are read as they are needed.
        file: one file of a hub data set, whose other files have other columns.
        revision: commit of a hub data set; by default the newest.
    """
    from datasets import load_dataset

    kind = FORMATS.get(Path(source).suffix.lower())
    if kind is None and Path(source).is_file():
        raise ValueError(
            f"cannot load data set {file_name(source)!r}: it is a file that ends in none of {', '.join(FORMATS)}"
        )
    try:
        if kind and not Path(source).is_dir():
            return load_dataset(kind, data_files=source, split="train", streaming=streaming)
        return load_dataset(source, split=split, streaming=streaming, data_files=file, revision=revision)
    except Exception as error:  # of files that are no data set, its readers raise errors of many kinds
        raise ValueError(f"cannot load data set {file_name(source)!r}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error of `datasets`, or of the error that it wraps."""
    if type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None:
        return reason(error.__cause__)
    return first_line(error)


def read_caption(cell: object, *, draw: str) -> str | None:
    """The text of a cell; None where the cell holds none, which is None, NaN, or an empty text or list.

    Of a list of texts, one is drawn as diffusers' training scripts do, by the seed `draw`. A cell that holds anything
    else raises ValueError.
    """
    texts = cell if isinstance(cell, list | tuple) else [cell]
    filled: list[str] = []
    for text in texts:
        if isinstance(text, str):
            filled += [text] if text.strip() else []
        elif not is_missing(text):
            raise ValueError(f"holds {short_repr(cell)}, where a text or a list of texts is expected,")
    return random.Random(draw).choice(filled) if filled else None


def read_label(cell: object) -> float | None:
    """The number of a cell, or None; a cell that holds anything but a number or a boolean raises ValueError."""
    if is_missing(cell):
        return None
    if not isinstance(cell, int | float):
        raise ValueError(f"holds {short_repr(cell)}, where a number is expected,")
    return float(cell)


def is_missing(cell: object) -> bool:
    """Whether a cell is None or NaN."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def has_picture(cell: object) -> bool:
    """Whether a cell holds a picture or the path of one."""
    if isinstance(cell, dict):
        return cell.get("bytes") is not None or bool(cell.get("path"))
    return not is_missing(cell) and cell not in ("", b"")


def read_picture(cell: object, folder: Path, name: str) -> Image.Image:
    """The picture of a cell, upright and in RGB; anything that is not a picture that can be read raises ValueError.

    Args:
        cell: encoded bytes, a path, a mapping of `bytes` and `path` as `datasets` has it, or a picture.
        folder: what a relative path is relative to.
        name: what the cell is called in an error message.
    """
    from stepfuse.data.images import open_picture  # imports torch, which names of prompt sets do not need

    if isinstance(cell, dict) and {"bytes", "path"} & set(cell):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str):
        if "://" in cell:
            raise ValueError(f"{name} is the address {cell}; expected a picture: download it first")
        file = find_file(folder, cell)
        return open_picture(file, f"{name} ({file_name(file)})")
    if isinstance(cell, bytes | Image.Image):
        return open_picture(cell, name)
    raise ValueError(f"{name} holds {short_repr(cell)}; expected a picture, encoded bytes or a path")
