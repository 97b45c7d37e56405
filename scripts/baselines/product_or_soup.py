"""Where the rule product is better than soup: a full factorial sweep over what could set the two apart.

    python -m stepfuse.scripts.baselines.product_or_soup emoji --output product-or-soup.json

Every cell draws the same prompts with the same noise by both rules and compares the weighted rewards, in units of their
deviation on the base. Factors: the variance schedules of the adapters (as trained, eta 1 for all, distinct), the size
of the LoRAs (their update times 1 or 2), the number of denoising steps, and the weights. A cell that was measured is
not measured again, so an interrupted sweep is continued by the same command.
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from stepfuse.data.intervals import interval_text
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.markdown import markdown_table
from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.weights import label_weights
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_factors, write_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.rewards.protocol import Reward, score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.statistics import percentile_interval, resample_prompts, resampled_means

SIZES = (1.0, 2.0)
SCHEDULES = ("as trained", "eta 1", "distinct")
STEPS = (5, 10, 20)
DRAWS = 2000  # of prompts, for intervals


class Factors(NamedTuple):
    """One level of each factor."""

    size: float
    schedules: str
    steps: int
    weights: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="an adapter set: a folder, a hub id, emoji-flow, or emoji")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", default="emoji-heldout:64")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    print(sweep(load_set(arguments.set), arguments.output, load_prompts(arguments.prompts)))


def sweep(loaded: AdapterSet, output: Path, prompts: Sequence[str]) -> str:
    """Measure every cell, store the difference of each image, and return the table of what the factors do."""
    known = read_json(output, "a sweep") if output.exists() else {}
    identity = {"adapters": [adapter.sha256 for adapter in loaded.adapters], "prompts": list(prompts)}
    if known and known["identity"] != identity:
        raise ValueError(f"{output} is the sweep of another set or of other prompts; choose another file")
    cells: list[dict[str, Any]] = known.get("cells", [])
    if lacking := set(loaded.names) - set(loaded.reward_scales):
        raise ValueError(f"the set has no unit for the reward of {sorted(lacking)[0]!r}; train with validation images")
    mixtures = {label_weights(weights): weights for weights in mixtures_of(loaded.names)}
    rewards = {objective.name: load_reward(objective.reward, "cpu") for objective in loaded.objectives}
    measured = [cell["factors"] for cell in cells]
    combinations = itertools.starmap(Factors, itertools.product(SIZES, SCHEDULES, STEPS, mixtures))
    samplers: dict[float, FusedSampler] = {}
    for factors in tqdm([each for each in combinations if each._asdict() not in measured], desc="sweep"):
        if factors.size not in samplers:
            samplers = {factors.size: load_sampler(loaded, factors.size)}
        sampler = with_schedules(samplers[factors.size], factors.schedules)
        scores = {
            rule: weighted_scores(sampler, loaded, rule, mixtures[factors.weights], factors.steps, prompts, rewards)
            for rule in ("product", "soup")
        }
        cells.append({"factors": factors._asdict(), "difference": (scores["product"] - scores["soup"]).tolist()})
        write_json(output, {"identity": identity, "cells": cells})
    summary, (better, worse) = effects(cells, prompts), resolved(cells, prompts)
    figures = {"effects": summary, "product_better": better, "soup_better": worse}
    write_json(output, {"identity": identity, "cells": cells} | figures)
    rows = [
        (one["factor"], one["level"], one["cells"], interval_text(one["difference"], signed=True)) for one in summary
    ]
    table = markdown_table(["factor", "level", "cells", "product minus soup, σ"], rows, right=["cells"])
    return f"{table}\n\n{sentence(better, worse, len(cells))}"


def sentence(better: int, worse: int, cells: int) -> str:
    """How often one of the rules is better than the other, beside what chance would make of equal ones."""
    return (
        f"Of {cells} cells product is better in {better} and soup in {worse}, by 95 % intervals. "
        f"If the two were equal, each would be better in {0.025 * cells:.1f} cells by chance."
    )


def mixtures_of(names: Sequence[str]) -> list[dict[str, float]]:
    """Equal weights of every pair, and of all."""
    pairs = [dict.fromkeys(pair, 0.5) for pair in itertools.combinations(names, 2)]
    return pairs if len(names) == 2 else [*pairs, dict.fromkeys(names, 1 / len(names))]


def load_sampler(loaded: AdapterSet, size: float) -> FusedSampler:
    """The set with the update of every LoRA times `size`."""
    with tempfile.TemporaryDirectory() as folder:
        scaled = []
        for adapter in loaded.adapters:
            part, factors = read_factors(adapter)
            larger = {module: replace(layer, alpha=layer.alpha * size) for module, layer in factors.items()}
            scaled.append(write_adapter(replace(adapter, folder=Path(folder, "adapters", adapter.name)), larger, part))
        created = create_set(Path(folder, "set"), [adapter.folder for adapter in scaled])
        return FusedSampler.from_pretrained(created)


def with_schedules(sampler: FusedSampler, schedules: str) -> FusedSampler:
    """Other variance schedules: eta 1 for all, or etas from .3 to 1 in equal distances, the last adapter with 1."""
    if schedules == "as trained":
        return sampler
    count = len(sampler.objectives)
    etas = [1.0] * count if schedules == "eta 1" else np.linspace(0.3, 1.0, count).tolist()
    changed = [
        replace(objective, variance=EtaSchedule(eta=eta))
        for objective, eta in zip(sampler.objectives, etas, strict=True)
    ]
    return replace(sampler, objectives=tuple(changed))


def weighted_scores(
    sampler: FusedSampler,
    loaded: AdapterSet,
    rule: str,
    weights: Mapping[str, float],
    steps: int,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
) -> np.ndarray:
    """Σ w_i r_i / σ_i of an image of each prompt."""
    pixels = sampler.with_rule(rule).sample(
        prompts,
        weights,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
        batch_size=64,
        output_type="pt",
        progress=False,
    )
    assert isinstance(pixels, torch.Tensor)
    scales = loaded.reward_scales
    columns = [w / scales[name] * score(rewards[name], pixels, prompts, name=name) for name, w in weights.items()]
    return torch.stack(columns).sum(0).double().numpy()


def effects(cells: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The mean difference over all cells, and over those of each level of each factor, with 95 % intervals.

    Intervals are of one bootstrap over prompts, which all cells have in common.
    """
    differences = np.array([cell["difference"] for cell in cells])
    resamples = resample_prompts(prompts, draws=DRAWS)
    levels = [("all", "")]
    levels += [(factor, level) for factor in cells[0]["factors"] for level in _levels(cells, factor)]
    summary = []
    for factor, level in levels:
        rows = [factor == "all" or cell["factors"][factor] == level for cell in cells]
        means = resampled_means(differences[rows].mean(0), resamples)
        interval = vars(percentile_interval(means))
        summary.append({"factor": factor, "level": str(level), "cells": sum(rows), "difference": interval})
    return summary


def resolved(cells: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> tuple[int, int]:
    """In how many cells the 95 % interval of the difference lies above 0, and in how many below."""
    resamples = resample_prompts(prompts, draws=DRAWS)
    intervals = [percentile_interval(resampled_means(np.array(cell["difference"]), resamples)) for cell in cells]
    return sum(one.low > 0 for one in intervals), sum(one.high < 0 for one in intervals)


def _levels(cells: Sequence[Mapping[str, Any]], factor: str) -> list[Any]:
    return list(dict.fromkeys(cell["factors"][factor] for cell in cells))


if __name__ == "__main__":
    main()
