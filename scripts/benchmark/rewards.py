"""Rewards beside the packages they come from: images a second, and the differences of scores.

The originals run in environments of their own, made at first use, with random weights in the published layout, which
stepfuse then loads: no download, and the comparison is the same as with the real ones.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stepfuse.rewards.hpsv2 import hpsv2
from stepfuse.rewards.image_files import in_batches, pair_prompts
from stepfuse.rewards.image_reward import ImageReward
from stepfuse.rewards.networks import NetworkReward
from stepfuse.rewards.pickscore import pickscore
from stepfuse.rewards.protocol import Reward
from stepfuse.scripts.benchmark import harness, memory
from stepfuse.scripts.benchmark.checkout import require_checkout
from stepfuse.scripts.benchmark.harness import Method, cell
from stepfuse.scripts.benchmark.settings import RewardBenchmark

OURS: dict[str, Callable[..., NetworkReward]] = {"image_reward": ImageReward, "hpsv2": hpsv2, "pickscore": pickscore}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIBRARIES = ("torch", "transformers", "stepfuse")
PromptedBatch = tuple[Tensor, list[str]]


def benchmark_rewards(
    settings: RewardBenchmark, *, progress: bool = True, report: memory.Report = lambda results: None
) -> dict[str, Any]:
    """Each reward: the original one image at a time, and stepfuse in batches, in alternation.

    Args:
        report: called with the results after each reward.

    Raises:
        ValueError: for images that cannot be read, an environment that cannot be made, and where this is not a checkout
            of the repository.
    """
    require_checkout()
    batches = _batches(settings)
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    with harness.cpu_threads(settings.threads):
        results: dict[str, Any] = {
            "format_version": 1,
            "gflop_per_second": dict.fromkeys(DTYPES, 0.0),
            **harness.context(torch.device("cpu"), LIBRARIES),
            "settings": asdict(settings)
            | {"images": Path(settings.images).name, "prompts": Path(settings.prompts).name},
            "rows": [],
        }
        for name in settings.rewards:
            row, speeds = _compare(name, settings, batches, progress=progress)
            results["rows"].append(row)
            for dtype, speed in speeds.items():
                results["gflop_per_second"][dtype] = max(results["gflop_per_second"][dtype], speed)
            report(results)
    return results


def _compare(
    name: str, settings: RewardBenchmark, batches: list[PromptedBatch], *, progress: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """A row of the results, and the GFLOP a second of large products."""
    from stepfuse.scripts.baselines.originals.start import start_original

    rewards: dict[str, Reward] = {}
    scores: dict[str, Tensor] = {}
    speeds = dict.fromkeys(DTYPES, 0.0)
    first = (batches[0][0][:1], batches[0][1][:1])

    def score(method: str) -> None:
        scores[method] = torch.cat([rewards[method](pixels, prompts).double() for pixels, prompts in batches])

    def original() -> Method:
        worker = rewards["original"] = start_original(name, folder, size=settings.size, threads=settings.threads or 1)
        return Method(run=partial(score, "original"), warm_up=lambda: worker(*first), close=worker.close)

    def ours(dtype: str) -> Method:
        reward = rewards[dtype] = OURS[name](folder, torch.device("cpu"), DTYPES[dtype])
        reward.batch_size = settings.batch_size
        return Method(run=partial(score, dtype), warm_up=lambda: reward(*first))

    def products(dtype: str) -> Method:
        def run() -> None:
            speeds[dtype] = max(speeds[dtype], _speed_of_products(DTYPES[dtype]))

        return Method(run=run)

    with tempfile.TemporaryDirectory(prefix="stepfuse-originals-") as temporary:
        folder = Path(temporary)
        # The warm-up of the original writes the weights, which the others load.
        builders = {"original": original} | {dtype: partial(ours, dtype) for dtype in DTYPES}
        builders |= {f"products in {dtype}": partial(products, dtype) for dtype in DTYPES}
        measured = harness.measure(
            builders,
            repeats=settings.repeats,
            device=torch.device("cpu"),
            required=builders,
            hint="give a smaller --batch_size or --size small",
            progress=progress,
            title=name,
        )
    with FlopCounterMode(display=False) as counted:
        rewards["float32"](*first)
    seconds, expected = measured.seconds, scores["original"]
    row: dict[str, Any] = {
        "reward": name,
        "images": len(expected),
        "gflop_per_image": counted.get_total_flops() / 1e9,
        "seconds": seconds["original"],
        "images_per_second": len(expected) / statistics.median(seconds["original"]),
        "scores": {
            "mean": expected.mean().item(),
            "deviation": expected.std().item() if len(expected) > 1 else 0.0,
        },
    }
    for dtype in DTYPES:
        row[dtype] = {
            "seconds": seconds[dtype],
            "images_per_second": len(expected) / statistics.median(seconds[dtype]),
            "ratio": harness.ratios(seconds["original"], seconds[dtype])["ratio"],
            "largest_difference": (scores[dtype] - expected).abs().max().item(),
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


def _batches(settings: RewardBenchmark) -> list[PromptedBatch]:
    """The images of the settings, or generated ones, with their prompts."""
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


DIFFERENCES: harness.Columns = [
    ("largest difference", lambda row: f"{row['float32']['largest_difference']:.1e}"),
    ("in bfloat16", lambda row: f"{row['bfloat16']['largest_difference']:.1e}"),
]


def reward_table(results: dict[str, Any]) -> str:
    """The rows as a table in Markdown.

    A bound is the ratio of images a second if stepfuse did nothing but products, at the best speed of a large layer.
    """

    def speed(dtype: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[dtype]['images_per_second']:.3g} ({row[dtype]['ratio']:.2f} ×)"

    def bound(dtype: str) -> Callable[[dict[str, Any]], str]:
        best = results["gflop_per_second"][dtype]
        return lambda row: f"{best / row['gflop_per_image'] / row['images_per_second']:.1f} ×"

    columns: harness.Columns = [
        ("reward", itemgetter("reward")),
        ("original, images/s", cell("images_per_second", ".3g")),
    ]
    for dtype in DTYPES:
        columns += [(dtype, speed(dtype)), ("bound", bound(dtype))]
    return harness.markdown_table([*columns, *DIFFERENCES], results)


def parity_table(results: dict[str, Any]) -> str:
    """The differences of scores, beside the spread of the original's scores over the images."""
    columns: harness.Columns = [
        ("reward", itemgetter("reward")),
        ("images", itemgetter("images")),
        ("scores of the original", lambda row: f"{row['scores']['mean']:.3f} ± {row['scores']['deviation']:.3f}"),
    ]
    return harness.markdown_table([*columns, *DIFFERENCES], results)
