"""Rewards against the packages they come from: images a second, and how far scores are apart.

The originals run in environments of their own, made at first use, with random weights of the published layout, which
ours then load: no download, and the same comparison with the real ones.
"""

import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from stepfuse.rewards.hpsv2 import hpsv2
from stepfuse.rewards.image_files import in_batches, pair_prompts
from stepfuse.rewards.image_reward import VOCABULARY, ImageReward
from stepfuse.rewards.pickscore import pickscore
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.registry import CONFIGS
from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings
from stepfuse.rewards.worker.environment import environment_python
from stepfuse.scripts.benchmark.originals.clip_vocabulary import write_tokenizer
from stepfuse.scripts.benchmark.settings import RewardBenchmark
from stepfuse.scripts.evaluation.costs import machine

ORIGINALS = Path(__file__).parent / "originals"
OURS: dict[str, Callable[..., Reward]] = {"image_reward": ImageReward, "hpsv2": hpsv2, "pickscore": pickscore}
REQUIREMENTS = {
    "image_reward": CONFIGS / "image_reward_original.txt",
    "hpsv2": ORIGINALS / "hpsv2.txt",
    "pickscore": CONFIGS / "image_reward_original.txt",  # of it, transformers 4
}
MERGES = "bpe_simple_vocab_16e6.txt.gz"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIBRARIES = ("torch", "transformers", "stepfuse")
Batch = tuple[Tensor, list[str]]


def benchmark_rewards(
    settings: RewardBenchmark, *, report: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Every reward in turn: the original one image at a time, then ours in batches, round by round.

    Raises:
        ValueError: for images that cannot be had, or an environment that cannot be made.
    """
    batches = _batches(settings)
    threads = settings.threads or torch.get_num_threads()
    settings = replace(settings, threads=threads)
    torch.set_num_threads(threads)
    results: dict[str, Any] = {
        "format_version": 1,
        "machine": machine(torch.device("cpu")),
        "gflop_per_second": dict.fromkeys(DTYPES, 0.0),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "settings": asdict(settings) | {"images": Path(settings.images).name, "prompts": Path(settings.prompts).name},
        "rows": [],
    }
    for name in settings.rewards:
        with tempfile.TemporaryDirectory(prefix="stepfuse-originals-") as folder:
            original = start_original(name, Path(folder), size=settings.size, threads=threads)
            try:
                original(batches[0][0][:1], batches[0][1][:1])  # makes the weights
                row, speeds = _compare(name, settings, original, Path(folder), batches)
                results["rows"].append(row)
                for dtype, speed in speeds.items():
                    results["gflop_per_second"][dtype] = max(results["gflop_per_second"][dtype], speed)
            finally:
                original.close()
        report(results)
    return results


def start_original(name: str, folder: Path, *, size: str, threads: int = 1) -> WorkerReward:
    """The original of a reward; its first call writes random weights in the published layout to the folder.

    Raises:
        ValueError: where its environment cannot be made.
    """
    python = environment_python(REQUIREMENTS[name])
    arguments: dict[str, Any] = {"folder": str(folder), "size": size, "threads": threads}
    if name == "image_reward":
        example = CONFIGS / "image_reward_original.py"
        arguments |= {"vocabulary": str(VOCABULARY), "example": str(example)}
    else:
        found = [*python.parents[1].glob(f"lib/python*/site-packages/*/{MERGES}")]
        if not found:
            raise ValueError(f"no {MERGES} in {python.parents[1]}; delete that folder, and it is made again")
        write_tokenizer(found[0], folder)
    settings = WorkerSettings(
        function=f"{name}.py:Original",
        requirements=str(REQUIREMENTS[name]),
        arguments=arguments,
        batch_size=2**20,  # it takes one at a time by itself
        timeout=7200,
    )
    return WorkerReward(settings, name=f"{name} as published", folder=ORIGINALS)


def reward_table(results: dict[str, Any]) -> str:
    """The rows as a table in Markdown.

    The bound is the ratio at which ours would do nothing but its products, at the best speed that a large layer had.
    """
    lines = [
        "| reward | original, images/s | float32 | bound | bfloat16 | bound | largest difference | in bfloat16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        cells = [row["reward"], f"{row['images_per_second']:.3g}"]
        for dtype in DTYPES:
            bound = results["gflop_per_second"][dtype] / row["gflop_per_image"] / row["images_per_second"]
            cells += [f"{row[dtype]['images_per_second']:.3g} ({row[dtype]['ratio']:.2f} ×)", f"{bound:.1f} ×"]
        cells += [f"{row[dtype]['largest_difference']:.1e}" for dtype in DTYPES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parity_table(results: dict[str, Any]) -> str:
    """How far scores are apart, beside how far images are apart in the original's."""
    lines = [
        "| reward | images | scores of the original | largest difference | in bfloat16 |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        spread = f"{row['scores']['mean']:.3f} ± {row['scores']['deviation']:.3f}"
        apart = [f"{row[dtype]['largest_difference']:.1e}" for dtype in DTYPES]
        lines.append(f"| {' | '.join([row['reward'], str(row['images']), spread, *apart])} |")
    return "\n".join(lines)


def _compare(
    name: str, settings: RewardBenchmark, original: WorkerReward, folder: Path, batches: list[Batch]
) -> tuple[dict[str, Any], dict[str, float]]:
    """A row, of seconds round by round and the largest difference of a score; and how fast large products were."""
    count = sum(len(pixels) for pixels, _ in batches)
    ours = {d: OURS[name](folder, "cpu", dtype, settings.batch_size) for d, dtype in DTYPES.items()}
    ways: dict[str, Reward] = {"original": original, **ours}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    scores: dict[str, Tensor] = {}
    speeds = dict.fromkeys(DTYPES, 0.0)
    with tqdm(total=settings.repeats * len(ways), desc=name, file=sys.stderr) as bar:
        for _ in range(settings.repeats):
            for way, reward in ways.items():
                begin = time.perf_counter()
                scores[way] = torch.cat([reward(pixels, prompts).double() for pixels, prompts in batches])
                seconds[way].append(time.perf_counter() - begin)
                bar.update()
            for d, dtype in DTYPES.items():
                speeds[d] = max(speeds[d], _speed_of_products(dtype))
    with FlopCounterMode(display=False) as counted:
        ours["float32"](batches[0][0][:1], batches[0][1][:1])
    row: dict[str, Any] = {
        "reward": name,
        "images": count,
        "gflop_per_image": counted.get_total_flops() / 1e9,
        "seconds": seconds["original"],
        "images_per_second": count / statistics.median(seconds["original"]),
        "scores": {
            "mean": scores["original"].mean().item(),
            "deviation": scores["original"].std().item() if count > 1 else 0.0,
        },
    }
    for d in DTYPES:
        row[d] = {
            "seconds": seconds[d],
            "images_per_second": count / statistics.median(seconds[d]),
            "ratio": statistics.median(a / b for a, b in zip(seconds["original"], seconds[d], strict=True)),
            "largest_difference": (scores[d] - scores["original"]).abs().max().item(),
        }
    return row, speeds


def _speed_of_products(dtype: torch.dtype, side: int = 2048) -> float:
    """GFLOP a second of one linear layer on many rows, at its best: what networks of such layers cannot exceed."""
    layer, rows = torch.nn.Linear(side, side).to(dtype), torch.randn(side, side).to(dtype)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        layer(rows)
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds) / 1e9


def _batches(settings: RewardBenchmark) -> list[Batch]:
    if settings.images:
        items = pair_prompts(Path(settings.images), Path(settings.prompts))[: settings.count]
        return [(pixels, [i.prompt for i in group]) for group, pixels in in_batches(items, settings.batch_size)]
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.random((settings.count, 3, 8, 8), dtype=np.float32))
    pictures = torch.nn.functional.interpolate(coarse, size=(512, 512), mode="bicubic").clamp(0, 1)
    pixels = (pictures * 255).round() / 255
    size = settings.batch_size
    prompts = [f"picture number {i} of a series, in many colours" for i in range(settings.count)]
    return [(pixels[i : i + size], prompts[i : i + size]) for i in range(0, settings.count, size)]
