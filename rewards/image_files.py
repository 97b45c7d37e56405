"""Images and prompts from a folder, as rewards want them."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from stepfuse.rewards.protocol import Pixels

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
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

    As reward packages do, by PIL's `convert("RGB")`: palettes are looked up, transparency is dropped. 16-bit grays are
    scaled to 8, where PIL alone would cut them off.

    Raises:
        ValueError: for a file that is no image, or one of floats, whose range nobody knows.
    """
    try:
        with Image.open(file) as opened:
            opened.load()
            image: Image.Image = opened
            if image.mode == "F":
                raise ValueError(f"{file} holds floats; save it with 8 or 16 bits a channel")
            if image.mode.startswith("I"):
                whole = (np.asarray(image).astype(np.int64).clip(0, 65535) / 257).round().astype(np.uint8)
                image = Image.fromarray(whole)
            array = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} is no image that can be read ({error})") from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


def pair_prompts(folder: Path, prompts: Path) -> list[PromptedImage]:
    """The images of a folder with their prompts.

    Args:
        folder: its images; names are sorted as people count, 2 before 10.
        prompts: a text file with a prompt a line, in that order, or one line for all; or a table, .csv or .jsonl, with
            `file_name` and `prompt` (or `text`, or `caption`), as data sets of images have it.

    Raises:
        ValueError: for a folder without images, and prompts that do not fit them.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if not prompts.is_file():
        raise ValueError(f"no prompts file {prompts}")
    try:
        text = prompts.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts} is not UTF-8 text: {error}") from error
    if prompts.suffix in (".csv", ".jsonl"):
        return _from_table(folder, prompts, text)
    images = (p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
    files = sorted(images, key=lambda p: _counted(p.name))
    if not files:
        raise ValueError(f"no images in {folder}; expected files ending in {', '.join(ENDINGS)}")
    lines = text.splitlines()  # an empty line is an empty prompt
    if len(lines) not in (1, len(files)):
        raise ValueError(f"{prompts} has {len(lines)} lines for the {len(files)} images of {folder}; expected as many")
    if len(lines) == 1:
        lines = lines * len(files)
    return [PromptedImage(file=f, name=f.name, prompt=line) for f, line in zip(files, lines, strict=True)]


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
    try:
        if table.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines(keepends=True)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
    items = []
    for number, row in enumerate(rows, 1):
        found = [row[c] for c in PROMPT_COLUMNS if isinstance(row, dict) and isinstance(row.get(c), str)]
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not found:
            raise ValueError(f"{table}, row {number}: expected file_name and one of {', '.join(PROMPT_COLUMNS)}")
        if not (folder / name).is_file():
            raise ValueError(f"{table}, row {number}: no image {folder / name}")
        items.append(PromptedImage(file=folder / name, name=name, prompt=found[0]))
    if not items:
        raise ValueError(f"{table} has no rows")
    return items


def _counted(name: str) -> list[tuple[int, int, str]]:
    """img2 before img10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]
