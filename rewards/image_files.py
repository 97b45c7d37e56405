"""Images and prompts from a folder, as rewards want them."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepfuse.data.images import open_picture
from stepfuse.data.text_files import file_name, find_file, note, read_text, split_lines
from stepfuse.rewards.protocol import Pixels

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
BY_SYSTEMS = ("thumbs.db", "desktop.ini")  # what file managers leave in folders, beside hidden files
MOST_PIXELS = 2**25  # of a batch: 400 MB as float32
PROMPT_COLUMNS = ("prompt", "text", "caption")


@dataclass(frozen=True, kw_only=True)
class PromptedImage:
    """An image file and the prompt it was made for; `name` is the file's, relative to its folder."""

    file: Path
    name: str
    prompt: str


def read_pixels(file: Path) -> Pixels:
    """One image as (1, 3, height, width) in [0, 1].

    Turned as its EXIF orientation says, and converted as `open_picture` does.

    Raises:
        ValueError: for a file that holds no picture that can be read.
    """
    array = np.array(open_picture(file))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def pair_prompts(folder: Path, prompts: Path) -> list[PromptedImage]:
    """The images of a folder with their prompts.

    Args:
        folder: its images; names are sorted as people count, 2 before 10. Hidden files and folders, whose names begin
            with a dot, are passed over. Folders, and files of other endings than `ENDINGS` (in capitals or not), are
            left out, and a line on standard error counts them.
        prompts: a UTF-8 text file with a prompt a line, in that order, or one line for all; or a table, .csv or
            .jsonl, with `file_name` and `prompt` (or `text`, or `caption`), as data sets of images have it.

    Raises:
        ValueError: for a folder without images, and prompts that do not fit them.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {file_name(folder)}")
    if not prompts.is_file():
        raise ValueError(f"no prompts file {file_name(prompts)}")
    text = read_text(prompts)
    if prompts.suffix.lower() in (".csv", ".jsonl"):
        return _from_table(folder, prompts, text)
    files = list_images(folder)
    lines = split_lines(text, file_name(prompts))  # an empty line is an empty prompt
    if len(lines) not in (1, len(files)):
        raise ValueError(
            f"{file_name(prompts)} has {len(lines)} lines for the {len(files)} images of {file_name(folder)}; "
            "expected as many, or one for all"
        )
    if len(lines) == 1:
        lines = lines * len(files)
    return [PromptedImage(file=f, name=file_name(f.name), prompt=line) for f, line in zip(files, lines, strict=True)]


def list_images(folder: Path) -> list[Path]:
    """The images of a folder, their names sorted as people count; see `pair_prompts` for what is left out.

    Raises:
        ValueError: for a folder without images.
    """
    files, others = [], Counter[str]()
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name.lower() in BY_SYSTEMS:
            continue
        if path.is_dir():
            others["folder"] += 1
        elif path.suffix.lower() in ENDINGS:
            files.append(path)
        else:
            others[file_name(path.suffix) or "file without an ending"] += 1
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    if not files:
        raise ValueError(
            f"no images in {file_name(folder)}; expected files ending in {', '.join(ENDINGS)}"
            + (f"; it holds {left_out}" if left_out else "")
        )
    if left_out:
        note(f"{file_name(folder)}: {len(files)} images; left out: {left_out}")
    return sorted(files, key=lambda path: _counted(path.name))


def in_batches(items: Sequence[PromptedImage], batch_size: int) -> Iterator[tuple[list[PromptedImage], Pixels]]:
    """Consecutive images of one size, at most `batch_size` and `MOST_PIXELS` together, in order."""
    waiting: list[PromptedImage] = []
    pixels: list[Pixels] = []
    for item in items:
        image = read_pixels(item.file)
        full = len(waiting) == batch_size or (len(waiting) + 1) * image[0, 0].numel() > MOST_PIXELS
        if waiting and (full or image.shape != pixels[0].shape):
            yield waiting, torch.cat(pixels)
            waiting, pixels = [], []
        waiting.append(item)
        pixels.append(image)
    if waiting:
        yield waiting, torch.cat(pixels)


def _from_table(folder: Path, table: Path, text: str) -> list[PromptedImage]:
    name = file_name(table)
    rows: list[Any] = []
    try:
        if table.suffix.lower() == ".csv":
            rows.extend(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows.extend(json.loads(line) for line in split_lines(text, name) if line.strip())
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}, row {len(rows) + 1} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{name} has no rows")
    return [_item(folder, row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]


def _item(folder: Path, row: Any, where: str) -> PromptedImage:
    """The image and the prompt of one row of a table."""
    column = next((c for c in PROMPT_COLUMNS if isinstance(row, dict) and c in row), None)
    if column is None or "file_name" not in row:
        raise ValueError(f"{where}: expected file_name and one of {', '.join(PROMPT_COLUMNS)}")
    for needed in ("file_name", column):
        if not isinstance(row[needed], str):
            held = "is empty" if row[needed] is None else f"holds {row[needed]!r}"
            raise ValueError(f"{where}: column {needed} {held}; expected a text")
    file = find_file(folder, row["file_name"])
    if not file.is_file():
        raise ValueError(f"{where}: no image {file_name(file)}")
    return PromptedImage(file=file, name=row["file_name"], prompt=row[column])


def _counted(name: str) -> list[tuple[int, int, str]]:
    """img2 before img10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]
