"""`stepfuse reward score` and `stepfuse reward serve`: score a folder of images with a reward, serve one."""

import csv
import json
import secrets
import sys
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from tqdm import tqdm

from stepfuse.data.file_info import text_hash
from stepfuse.data.grid import CELL, captioned_grid
from stepfuse.data.images import to_image
from stepfuse.data.intervals import number_text
from stepfuse.data.lettering import enlarge
from stepfuse.data.output_file import atomic_file, output_errors, real_path
from stepfuse.data.palette import LIGHT
from stepfuse.data.text_files import file_name, write_text
from stepfuse.rewards.image_files import PromptedImage, in_batches, pair_prompts, read_pixels
from stepfuse.rewards.protocol import Reward, close, score
from stepfuse.rewards.registry import check_reward_dtype, load_reward, reward_unit
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.rewards.server import RewardServer
from stepfuse.rewards.token_file import TOKEN, read_token

COLUMNS = ("file_name", "prompt", "score")
SHOWN = 32  # images of a picture


def score_folder(
    name: str,
    folder: Path,
    prompts: Path,
    output: Path,
    *,
    device: str,
    batch_size: int,
    picture: Path | None,
    reward_dtype: torch.dtype = torch.float32,
) -> None:
    """Write file_name, prompt and score of every image to a CSV file, in order; a file that exists is replaced.

    Rows are added to a temporary file as they are scored. Interrupted, and run again, it resumes after the last row.
    """
    check_reward_dtype([name], reward_dtype)
    items = pair_prompts(folder, prompts)
    with output_errors(output):
        partial = _partial_file(real_path(output), name, reward_dtype, items)
        partial.parent.mkdir(parents=True, exist_ok=True)
        done = _whole_rows(partial)
        if [row[:2] for row in done] != [[item.name, item.prompt] for item in items[: len(done)]]:
            done = []
        write_text(partial, "".join(json.dumps(row) + "\n" for row in done))
    reward = load_reward(name, device, reward_dtype)
    try:
        _score_rest(reward, name, items[len(done) :], partial, device, batch_size)
    finally:
        close(reward)
    rows = _whole_rows(partial)
    with atomic_file(output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([COLUMNS, *((*row, repr(value)) for *row, value in rows)])
    partial.unlink()
    scores = [value for *_, value in rows]
    ends = f"{min(scores):.4g} to {max(scores):.4g}"
    print(f"{file_name(output)}: {len(scores)} images, {name} {fmean(scores):.4g} on average, {ends}")
    if picture is not None:
        show_ranked(items, scores, picture, unit=reward_unit(name))
        print(f"{file_name(picture)}: the best {min(SHOWN, len(items))} first")


def show_ranked(items: list[PromptedImage], scores: list[float], file: Path, *, unit: str | None = None) -> None:
    """The images in order of their scores, the best first, as one picture; the scores have their unit."""
    order = sorted(range(len(items)), key=lambda i: -scores[i])[:SHOWN]
    tiles = [_tile(to_image(read_pixels(items[i].file)[0])) for i in order]
    with atomic_file(file) as temporary:
        captions = [f"{number_text(scores[i])}{f' {unit}' if unit else ''}\n{items[i].prompt}" for i in order]
        captioned_grid(tiles, captions, columns=8).save(temporary)


def _tile(image: Image.Image) -> Image.Image:
    """An image on a square of paper: a small one enlarged by a whole factor with crisp edges, a large one shrunk."""
    image = enlarge(image, max(1, CELL // max(image.size)))
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (CELL, CELL), LIGHT.paper)
    tile.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return tile


def serve(
    name: str,
    *,
    host: str,
    port: int,
    token_file: Path | None,
    device: str,
    reward_dtype: torch.dtype = torch.float32,
) -> None:
    """Serve a reward until interrupted."""
    check_reward_dtype([name], reward_dtype)
    given = read_token(token_file)
    token = given or secrets.token_urlsafe(24)
    reward = load_reward(name, device, reward_dtype)
    with RewardServer(reward, name=name, address=(host, port), token=token, device=device) as server:
        print(f"{name} at {server.url}", flush=True)
        if given is None:
            print(f"clients need its token: export {TOKEN}={token}", flush=True)
        if host not in ("127.0.0.1", "localhost"):
            print("images and token cross the network in the clear; a tunnel or a proxy encrypts them", file=sys.stderr)
        try:
            server.serve_forever()
        finally:
            close(reward)


def _score_rest(
    reward: Reward, name: str, items: list[PromptedImage], partial: Path, device: str, batch_size: int
) -> None:
    """Add a row for each of these images to the unfinished table."""
    with (
        open(partial, "a", encoding="utf-8", newline="\n") as handle,
        tqdm(total=len(items), desc=name, unit="image") as bar,
        torch.no_grad(),
    ):
        for batch, pixels in in_batches(items, batch_size):
            try:
                values = score(reward, pixels.to(device), [item.prompt for item in batch], name=name).tolist()
            except ValueError as error:
                raise ValueError(f"{batch[0].name} to {batch[-1].name}: {error}") from error
            rows = [[item.name, item.prompt, value] for item, value in zip(batch, values, strict=True)]
            handle.writelines(json.dumps(row) + "\n" for row in rows)  # in ASCII: lines end between rows alone
            handle.flush()
            bar.update(len(batch))


def _partial_file(output: Path, name: str, dtype: torch.dtype, items: list[PromptedImage]) -> Path:
    """The unfinished table of this reward on these images; another name where its code, its precision or an image
    differs.
    """
    path = parse_reward(name).path
    code = Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).is_file() else ""
    images = (f"{i.name}\0{i.prompt}\0{i.file.stat().st_mtime_ns}" for i in items)
    precision = [] if dtype == torch.float32 else [str(dtype)]
    digest = text_hash("\0".join([name, code, *precision, *images]))
    return output.with_name(f".{output.name}.{digest[:12]}.partial")


def _whole_rows(file: Path) -> list[list]:
    """The rows of an unfinished table, without a last one that was cut off."""
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]
