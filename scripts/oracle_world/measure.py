"""Every fusion rule measured in worlds whose optimum is known: `world.json`, and `world.md` to read.

- The sliced 2-Wasserstein distance, SW² = mean over directions u and ranks k of [(u·x)_(k) - (u·y)_(k)]², where (k) is
  the k-th smallest: final samples x of a rule, y of an independent run of the target, replicate by replicate.
- Its floor, the same between two independent runs of the target. Rules and this second run share x_T and noise, so
  the distance over the floor is a paired difference; the bound is the floor's mean + 3 standard deviations.
- The expected KL a run, E Σ_t KL(p*(.|x_t) ‖ p_rule(.|x_t)) over trajectories of the target, in closed form.
- For rules that select one expert a step, the distance to the output of the product (the blend) and to that of
  `AverageStep`, and with the same x_T and noise the root mean square of |x_0 - x_0 of product|, path by path.
- The distance to the tilted data p(x_0) exp(Σ w_i q_i(x_0)), the target of RL on whole runs.

Intervals are 95 %, Student's t over replicates; of `code`, which draws image by image, a bootstrap over fewer images.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm

from stepfuse.data.json_file import write_json
from stepfuse.data.output_file import atomic_file
from stepfuse.data.text_files import write_text
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.scripts.oracle_world.page import (
    CANDIDATES,
    CODE_IMAGES,
    EXACT,
    FILES,
    GAUSSIAN,
    NOT_MEASURED,
    PICKING,
    page,
    verdicts,
)
from stepfuse.scripts.oracle_world.world import BASE_ETA, DATA, DIM, OBJECTIVES, AverageStep, World, world_of

DIRECTIONS = 32
WEIGHTS: dict[int, tuple[tuple[float, ...], ...]] = {
    2: ((0.5, 0.5), (0.8, 0.2)),
    3: ((1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)),
    4: ((0.25, 0.25, 0.25, 0.25), (0.5, 0.25, 0.15, 0.1)),
}


def measure_world(
    output_dir: Path,
    *,
    seed: int = 0,
    samples: int = 3000,
    replicates: int = 8,
    objectives: Sequence[int] = (2, 3, 4),
    steps: Sequence[int] = (10, 20, 50),
) -> dict:
    """Measure every cell, and write `world.json` and `world.md`; returns what `world.json` holds.

    A cell is a number of objectives, 2 to 4, their weights, a number of steps, and variances that are equal or
    distinct. Each replicate has `samples` final samples with two objectives, where the verdicts are; half with more.
    """
    for name, count in (("samples", samples), ("replicates", replicates)):
        if count < 2:
            raise ValueError(f"{name} {count}; expected 2 or more")
    unknown = [count for count in objectives if count not in WEIGHTS]
    if unknown or not objectives:
        raise ValueError(f"objectives {', '.join(map(str, unknown)) or 'none'}; expected some of 2, 3, 4")
    if not steps:
        raise ValueError("steps none; expected one or more numbers of denoising steps")
    mixtures = [weights for number in objectives for weights in WEIGHTS[number]]
    worlds = [(kind, world_of(kind, *cell)) for kind in OBJECTIVES for cell in product(mixtures, steps)]
    for _, world in worlds:
        _ = world.times  # a number of steps that the scheduler cannot take fails before anything is measured
    clock, cpu = time.perf_counter(), time.process_time()
    cells = []
    for kind, world in tqdm(worlds, desc="oracle world", unit="cell"):
        number = len(world.weights)
        key = [seed, number, *(round(1e6 * w) for w in world.weights), world.steps, list(OBJECTIVES).index(kind)]
        share = samples if number == 2 else max(samples // 2, 2)
        cell = measure_cell(world, samples=share, replicates=replicates, seeds=np.random.SeedSequence(key))
        cells.append({"objectives": number, "weights": world.weights, "steps": world.steps, "variances": kind} | cell)
    result = {
        "seed": seed,
        "samples": samples,
        "replicates": replicates,
        "distance": f"sliced 2-Wasserstein, sorted samples, {DIRECTIONS} directions evenly over the half circle",
        "code": {"candidates": CANDIDATES, "images": CODE_IMAGES},
        "world": {
            "data": {name: getattr(DATA, name).tolist() for name in ("weights", "means", "variances")},
            "objectives": {kind: [vars(o) for o in members] for kind, members in OBJECTIVES.items()},
            "base_eta": BASE_ETA,
        },
        "cells": cells,
        "not_measured": NOT_MEASURED,
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "versions": {name: version(name) for name in ("stepfuse", "torch", "diffusers", "numpy")},
    }
    result["verdicts"] = list(verdicts(cells))
    write_json(output_dir / FILES[0], result)
    with atomic_file(output_dir / FILES[1]) as temporary:
        write_text(temporary, page(result))
    return result


def measure_cell(world: World, *, samples: int, replicates: int, seeds: np.random.SeedSequence) -> dict:
    """Every rule in one world."""
    total = samples * replicates
    reference_seed, noise_seed, other_seed = (int(s) for s in seeds.generate_state(3, np.uint32))
    other = torch.Generator().manual_seed(other_seed)
    uniforms = torch.rand(total, max(world.steps, len(world.weights) + 1), generator=other, dtype=torch.float64)

    def run(policy: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return policy(_points(total, generator), generator).numpy()

    def run_rule(rule: FusionRule, seed: int) -> np.ndarray:
        return run(lambda x, generator: world.run_rule(rule, x, uniforms, generator), seed)

    distance = partial(sliced_distance, replicates=replicates)
    reference, second = run(world.run_target, reference_seed), run(world.run_target, noise_seed)
    blend, mixed = (run_rule(rule, reference_seed) for rule in (get_rule("product"), AverageStep()))
    random = np.random.default_rng(other_seed)
    tilted, tilted_again = world.draw_tilted_data(total, random), world.draw_tilted_data(total, random)
    finals = {name: run_rule(get_rule(name), noise_seed) for name in (*GAUSSIAN, *PICKING, "rgg")}
    floor = distance(second, reference)
    bound = floor.mean() + 3 * floor.std(ddof=1)
    rules: dict[str, dict[str, Any]] = {}
    for name, final in finals.items():
        to_target = distance(final, reference)
        rules[name] = {
            "to_target": interval(to_target),
            "over_floor": interval(to_target - floor),
            "to_tilted_data": interval(distance(final, tilted)),
        }
    images = min(samples, CODE_IMAGES)
    code = _run_code(world, images, other_seed)
    rules["code"] = {
        "to_target": _bootstrap(code, reference[:images], random),
        "to_tilted_data": _bootstrap(code, tilted[:images], random),
        "floor_tilted_data": _bootstrap(tilted_again[:images], tilted[:images], random),
    }
    for name, kl in expected_kl(world, samples, reference_seed).items():
        rules[name]["kl"] = kl
    paths = {name: ((finals[name] - finals["product"]) ** 2).sum(1).reshape(replicates, samples) for name in PICKING}
    comparisons = {  # figure of each rule → name of switch's less systematic's, and each rule's distances
        "to_blend": ("", {name: distance(finals[name], blend) for name in PICKING}),
        "coupled_to_blend": ("_coupled", {name: np.sqrt(path.mean(1)) for name, path in paths.items()}),
        "to_average_step": ("_average", {name: distance(finals[name], mixed) for name in PICKING}),
    }
    gains: dict[str, Any] = {}
    for figure, (infix, distances) in comparisons.items():
        for name, values in distances.items():
            rules[name][figure] = interval(values)
        gains[f"systematic{infix}_gain"] = gain = interval(distances["switch"] - distances["systematic"])
        gains[f"systematic{infix}_closer"] = "yes" if gain["low"] > 0 else "no" if gain["high"] < 0 else "not resolved"
    within = bool(rules["product"]["to_target"]["mean"] <= bound)
    return {
        "floor": {"mean": floor.mean(), "sd": floor.std(ddof=1), "bound": bound},
        "tilted_data": {
            "floor": interval(distance(tilted_again, tilted)),
            "target": interval(distance(second, tilted)),
        },
        "rules": rules,
        "product_from_target": float(np.abs(finals["product"] - second).max()),  # same x_T, same noise
        "product_within_floor": within,
        "product_exact": within and rules["product"]["kl"] < EXACT,
        "average_step_from_blend": interval(distance(mixed, second)),
    } | gains


def sliced_distance(a: np.ndarray, b: np.ndarray, replicates: int) -> np.ndarray:
    """The sliced 2-Wasserstein distance of replicate r of a to replicate r of b."""
    angles = np.arange(DIRECTIONS) * np.pi / DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)])
    ordered = [np.sort((x @ directions).reshape(replicates, -1, DIRECTIONS), axis=1) for x in (a, b)]
    return np.sqrt(((ordered[0] - ordered[1]) ** 2).mean((1, 2)))


def expected_kl(world: World, samples: int, seed: int) -> dict[str, float]:
    """E Σ_t KL(p*(.|x_t) ‖ p_rule(.|x_t)) over the target's trajectories, for the rules that are Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    x = _points(samples, generator)
    rules = {name: get_rule(name) for name in GAUSSIAN}
    runs = {name: world.run(rule, samples) for name, rule in rules.items()}
    total = dict.fromkeys(rules, 0.0)
    uniforms = torch.zeros(samples, world.steps, dtype=torch.float64)  # these rules draw none
    for k, (t, s) in enumerate(world.times):
        target = world.target(x.numpy(), t, s)
        for name, rule in rules.items():
            total[name] += target.kl(rule.fuse(runs[name].step(k, x, uniforms))).mean().item()
        x = target.sample(generator)
    return total


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % interval over replicates."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return _around(float(values.mean()), float(half))


def _around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _points(count: int, generator: torch.Generator) -> Tensor:
    """x_T."""
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64)


def _run_code(world: World, samples: int, seed: int) -> np.ndarray:
    """Blockwise best of N by the rule's loop, which gives each image and candidate a separate generator."""
    rule = get_rule("code", candidates=CANDIDATES)
    x = _points(samples, torch.Generator().manual_seed(seed))
    seeds = np.random.SeedSequence(seed).generate_state(samples, np.uint64) >> 2
    return rule.denoise(world.run(rule, samples), x, [torch.Generator().manual_seed(int(s)) for s in seeds]).numpy()


def _bootstrap(a: np.ndarray, b: np.ndarray, random: np.random.Generator, resamples: int = 20) -> dict[str, float]:
    """The distance, and a 95 % interval by the standard deviation over resampled rows of a."""
    draws = [sliced_distance(a[random.integers(len(a), size=len(a))], b, 1).item() for _ in range(resamples)]
    return _around(sliced_distance(a, b, 1).item(), 1.96 * float(np.std(draws, ddof=1)))
