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
from stepfuse.rewards.protocol import Reward, close
from stepfuse.scripts.benchmark import harness, memory
from stepfuse.scripts.benchmark.harness import Method, cell
from stepfuse.scripts.benchmark.settings import RewardBenchmark

OURS: dict[str, Callable[..., NetworkReward]] = {"image_reward": ImageReward, "hpsv2": hpsv2, "pickscore": pickscore}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PromptedBatch = tuple[Tensor, list[str]]


def benchmark_rewards(settings: RewardBenchmark, *, report: memory.Report = lambda results: None) -> dict[str, Any]:
    """Each reward: the original one image at a time, and stepfuse in batches, in alternation.

    Raises:
        ValueError: for images that cannot be read, and an environment that cannot be made.
    """
    batches = _batches(settings)
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    names = {"images": Path(settings.images).name, "prompts": Path(settings.prompts).name}
    with harness.cpu_threads(settings.threads):
        results: dict[str, Any] = {
            "format_version": 1,
            "gflop_per_second": dict.fromkeys(DTYPES, 0.0),
            **harness.context(torch.device("cpu")),
            "settings": asdict(settings) | names,
            "rows": [],
        }
        for name in settings.rewards:
            results["rows"].append(_compare(name, settings, batches, results["gflop_per_second"]))
            report(results)
    return results


def _compare(
    name: str, settings: RewardBenchmark, batches: list[PromptedBatch], speeds: dict[str, float]
) -> dict[str, Any]:
    """A row of the results; `speeds`, the GFLOP a second of large products, are kept at their largest."""
    from stepfuse.scripts.baselines.originals.start import start_original

    rewards: dict[str, Reward] = {}
    scores: dict[str, Tensor] = {}
    first = (batches[0][0][:1], batches[0][1][:1])

    def load_ours(dtype: torch.dtype) -> Reward:
        reward = OURS[name](folder, torch.device("cpu"), dtype)
        reward.batch_size = settings.batch_size
        return reward

    def method(key: str, load: Callable[[], Reward]) -> Method:
        reward = rewards[key] = load()

        def run() -> None:
            scores[key] = torch.cat([reward(pixels, prompts).double() for pixels, prompts in batches])

        return Method(run=run, warm_up=lambda: reward(*first), close=partial(close, reward))

    def products(key: str) -> Method:
        def run() -> None:
            speeds[key] = max(speeds[key], _speed_of_products(DTYPES[key]))

        return Method(run=run)

    with tempfile.TemporaryDirectory(prefix="stepfuse-originals-") as temporary:
        folder = Path(temporary)
        # The warm-up of the original writes the weights, which the others load.
        start = partial(start_original, name, folder, size=settings.size, threads=settings.threads or 1)
        builders = {"original": partial(method, "original", start)}
        for key, dtype in DTYPES.items():
            builders[key] = partial(method, key, partial(load_ours, dtype))
        builders |= {f"products in {key}": partial(products, key) for key in DTYPES}
        seconds = harness.measure(
            builders,
            repeats=settings.repeats,
            device=torch.device("cpu"),
            required=builders,
            hint="give a smaller --batch_size or --size small",
            title=name,
        ).seconds
    with FlopCounterMode(display=False) as counted:
        rewards["float32"](*first)
    expected = scores["original"]

    def speed(key: str) -> dict[str, Any]:
        return {"seconds": seconds[key], "images_per_second": len(expected) / statistics.median(seconds[key])}

    deviation = expected.std().item() if len(expected) > 1 else 0.0
    row: dict[str, Any] = {
        "reward": name,
        "images": len(expected),
        "gflop_per_image": counted.get_total_flops() / 1e9,
        **speed("original"),
        "scores": {"mean": expected.mean().item(), "deviation": deviation},
    }
    for key in DTYPES:
        difference = (scores[key] - expected).abs().max().item()
        ratio = harness.ratios(seconds["original"], seconds[key])["ratio"]
        row[key] = speed(key) | {"ratio": ratio, "largest_difference": difference}
    return row


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
    """A bound is the ratio of images a second if stepfuse did nothing but products, at the speed of a large layer."""

    def speed(dtype: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[dtype]['images_per_second']:.3g} ({row[dtype]['ratio']:.2f} ×)"

    def bound(dtype: str) -> Callable[[dict[str, Any]], str]:
        best = results["gflop_per_second"][dtype]
        return lambda row: f"{best / row['gflop_per_image'] / row['images_per_second']:.1f} ×"

    columns: harness.Columns = [
        ("reward", cell("reward")),
        ("original, images/s", cell("images_per_second", ".3g")),
    ]
    for dtype in DTYPES:
        columns += [(dtype, speed(dtype)), ("bound", bound(dtype))]
    return harness.results_table([*columns, *DIFFERENCES], results)


def parity_table(results: dict[str, Any]) -> str:
    """The differences of scores, beside the spread of the original's scores over the images."""
    columns: harness.Columns = [
        ("reward", cell("reward")),
        ("images", cell("images")),
        ("scores of the original", lambda row: f"{row['scores']['mean']:.3f} ± {row['scores']['deviation']:.3f}"),
    ]
    return harness.results_table([*columns, *DIFFERENCES], results)
