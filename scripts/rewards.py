"""`stepfuse reward`: list them, score a folder with one, serve one."""

import csv
import hashlib
import os
import secrets
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from stepfuse.rewards.catalogue import CATALOGUE, table
from stepfuse.rewards.image_files import PromptedImage, in_batches, pair_prompts, read_pixels
from stepfuse.rewards.over_http import TOKEN
from stepfuse.rewards.protocol import Reward, score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.server import RewardServer
from stepfuse.train.samples import save_samples

COLUMNS = ("file_name", "prompt", "score")
SHOWN = 32  # images of a picture


def list_rewards() -> None:
    """What `stepfuse reward list` prints: one column aligned after another."""
    rows = table(CATALOGUE)
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nOf a folder with its weights: NAME:FOLDER. Your own: path/to/file.py:function, or path/to/file.yaml with "
        "reward:, worker: or http:. A server's: http://127.0.0.1:8765"
    )


def score_folder(
    name: str,
    folder: Path,
    prompts: Path,
    output: Path,
    *,
    device: torch.device,
    batch_size: int,
    overwrite: bool,
    picture: Path | None = None,
) -> None:
    """Write file_name, prompt and score of every image to a CSV file, in order.

    Rows are added to a file aside as they are scored. Interrupted, and run again, it goes on after the last of them.

    Raises:
        ValueError: for images, prompts or a reward that cannot be had, and a table that is there.
    """
    for file in (output, picture):
        if file is not None and file.exists() and not overwrite:
            raise ValueError(f"{file} exists; give another file or --overwrite")
    items = pair_prompts(folder, prompts)
    aside = _aside(output, name, items)
    done = _read_rows(aside) if aside.is_file() else []
    if [row[:2] for row in done] != [(item.name, item.prompt) for item in items[: len(done)]]:
        done = []
    reward = load_reward(name, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    scores = [float(row[2]) for row in done]
    with open(aside, "w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle)
        rows.writerows(done)
        scores += _score_rest(reward, name, items[len(done) :], rows, handle, device, batch_size)
    table_of = [(item.name, item.prompt, repr(value)) for item, value in zip(items, scores, strict=True)]
    with open(aside, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([COLUMNS, *table_of])
    aside.replace(output)
    values = torch.tensor(scores, dtype=torch.float64)
    ends = f"{values.min():.4g} to {values.max():.4g}"
    print(f"{output}: {len(values)} images, {name} {values.mean():.4g} on average, {ends}")
    if picture is not None:
        show_ranked(items, scores, picture)
        print(f"{picture}: the best {min(SHOWN, len(items))} first")


def show_ranked(items: list[PromptedImage], scores: list[float], file: Path) -> None:
    """The images in order of their scores, the best first, as one picture."""
    order = sorted(range(len(items)), key=lambda i: -scores[i])[:SHOWN]
    tiles = torch.cat([_tile(read_pixels(items[i].file)) for i in order])
    save_samples(file, tiles, [f"{scores[i]:.3g}  {items[i].prompt}" for i in order], columns=8)


def serve(name: str, *, host: str, port: int, token: str | None, device: torch.device) -> None:
    """Serve a reward until interrupted.

    Raises:
        ValueError: for a reward that cannot be loaded, or an address that is taken.
    """
    own = token or os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    server = RewardServer(load_reward(name, device), name=name, address=(host, port), token=own, device=device)
    print(f"{name} at {server.url}", flush=True)
    if not token and not os.environ.get(TOKEN):
        print(f"clients need its token: export {TOKEN}={own}", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print("images and the token cross the network in the clear; a tunnel or a proxy encrypts them", file=sys.stderr)
    with server:
        server.serve_forever()


def _score_rest(
    reward: Reward,
    name: str,
    items: list[PromptedImage],
    rows: "csv._writer",
    handle: "object",
    device: torch.device,
    batch_size: int,
) -> list[float]:
    scores: list[float] = []
    with tqdm(total=len(items), desc=name, unit="image") as bar, torch.no_grad():
        for batch, pixels in in_batches(items, batch_size):
            try:
                values = score(reward, pixels.to(device), [item.prompt for item in batch], name=name).tolist()
            except ValueError as error:
                raise ValueError(f"{batch[0].name} to {batch[-1].name}: {error}") from error
            rows.writerows((item.name, item.prompt, repr(v)) for item, v in zip(batch, values, strict=True))
            handle.flush()  # type: ignore[attr-defined]
            scores += values
            bar.update(len(batch))
    return scores


def _tile(pixels: torch.Tensor, side: int = 128) -> torch.Tensor:
    """One image within a white square."""
    height, width = pixels.shape[-2:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    tile = torch.ones(1, 3, side, side)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    tile[..., top : top + size[0], left : left + size[1]] = small
    return tile


def _aside(output: Path, name: str, items: list[PromptedImage]) -> Path:
    """The unfinished table of this reward on these images: another reward's is never gone on with."""
    what = "\0".join([name, *(f"{i.name}\0{i.prompt}\0{i.file.stat().st_mtime_ns}" for i in items)])
    return output.with_name(f".{output.name}.{hashlib.sha256(what.encode()).hexdigest()[:12]}.partial")


def _read_rows(file: Path) -> list[tuple[str, ...]]:
    """The whole rows of an unfinished table."""
    with open(file, newline="", encoding="utf-8") as handle:
        rows = [tuple(row) for row in csv.reader(handle)]
    whole = []
    for row in rows:
        try:
            float(row[2])
        except (IndexError, ValueError):
            break  # cut off
        whole.append(row)
    return whole
