"""Images of a folder and their prompts, as the input of rewards."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepfuse.data.images import open_picture, to_pixels
from stepfuse.data.text_files import file_name, find_file, note, read_text, split_lines
from stepfuse.rewards.protocol import Pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # created by file managers
MAX_BATCH_PIXELS = 2**25  # 400 MB as float32
PROMPT_COLUMNS = ("prompt", "text", "caption")


@dataclass(frozen=True, kw_only=True)
class PromptedImage:
    """An image file, its name relative to the folder, and the prompt it was generated for."""

    file: Path
    name: str
    prompt: str


def read_pixels(file: Path) -> Pixels:
    """Read an image file as pixels in [0, 1] of shape (1, 3, height, width); see `open_picture`."""
    return to_pixels(open_picture(file))[None]


def pair_prompts(folder: Path, prompts: Path) -> list[PromptedImage]:
    """Pair the images of a folder with prompts, or raise ValueError if they do not match.

    Args:
        folder: Folder of the images; see `list_images` for their order.
        prompts: A UTF-8 text file with one prompt per line in the order of the images, or a single line for all images;
            or a .csv or .jsonl file with the columns `file_name` and `prompt` (or `text` or `caption`), as image data
            sets of the hub have.
    """
    if not folder.is_dir():
        raise ValueError(f"no image folder {file_name(folder)}")
    text = read_text(prompts)
    if prompts.suffix.lower() in (".csv", ".jsonl"):
        return _read_table(folder, prompts, text)
    files = list_images(folder)
    lines = split_lines(text, file_name(prompts))  # an empty line is an empty prompt
    if len(lines) not in (1, len(files)):
        raise ValueError(
            f"{file_name(prompts)} has {len(lines)} lines for the {len(files)} images of {file_name(folder)}; "
            "expected one line per image, or one line for all images"
        )
    if len(lines) == 1:
        lines = lines * len(files)
    return [PromptedImage(file=f, name=file_name(f.name), prompt=line) for f, line in zip(files, lines, strict=True)]


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder in natural order, img2 before img10, or raise ValueError if there are none.

    Names that begin with a dot are ignored. Subfolders and files with other suffixes than `SUFFIXES` are skipped, and a
    line on standard error counts them.
    """
    visible = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in SYSTEM_FILES]
    files = [path for path in visible if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    skipped = Counter(
        "folder" if path.is_dir() else file_name(path.suffix) or "file without a suffix"
        for path in set(visible) - set(files)
    )
    summary = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
    if not files:
        raise ValueError(
            f"no images in {file_name(folder)}; expected files with the suffixes {', '.join(SUFFIXES)}"
            + (f"; found {summary}" if summary else "")
        )
    if summary:
        note(f"{file_name(folder)}: {len(files)} images; skipped: {summary}")
    return sorted(files, key=lambda path: _natural_key(path.name))


def in_batches(items: Sequence[PromptedImage], batch_size: int) -> Iterator[tuple[list[PromptedImage], Pixels]]:
    """Yield batches of consecutive images of one size, at most `batch_size` and `MAX_BATCH_PIXELS` pixels."""
    batch: list[PromptedImage] = []
    pixels: list[Pixels] = []
    for item in items:
        image = read_pixels(item.file)
        full = len(batch) == batch_size or (len(batch) + 1) * image[0, 0].numel() > MAX_BATCH_PIXELS
        if batch and (full or image.shape != pixels[0].shape):
            yield batch, torch.cat(pixels)
            batch, pixels = [], []
        batch.append(item)
        pixels.append(image)
    if batch:
        yield batch, torch.cat(pixels)


def _read_table(folder: Path, table: Path, text: str) -> list[PromptedImage]:
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
    return [_read_row(folder, row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]


def _read_row(folder: Path, row: Any, location: str) -> PromptedImage:
    """The image and the prompt of one row; `location` names the row in error messages."""
    column = next((c for c in PROMPT_COLUMNS if isinstance(row, dict) and c in row), None)
    if column is None or "file_name" not in row:
        raise ValueError(f"{location}: expected the columns file_name and one of {', '.join(PROMPT_COLUMNS)}")
    for name in ("file_name", column):
        if not isinstance(row[name], str):
            found = "is empty" if row[name] is None else f"holds {row[name]!r}"
            raise ValueError(f"{location}: column {name} {found}; expected a string")
    file = find_file(folder, row["file_name"])
    if not file.is_file():
        raise ValueError(f"{location}: no image {file_name(file)}")
    return PromptedImage(file=file, name=row["file_name"], prompt=row[column])


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which img2 precedes img10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]
