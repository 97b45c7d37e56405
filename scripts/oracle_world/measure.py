"""Every fusion rule measured in worlds whose optimum is known: `world.json`, and `world.md` to read."""

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stepfuse.data.folder_files import files_named
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.output_file import atomic_file
from stepfuse.data.text_files import write_text
from stepfuse.scripts.oracle_world.cell import DIRECTIONS, measure_cell
from stepfuse.scripts.oracle_world.page import CANDIDATES, CODE_IMAGES, NOT_MEASURED, page, verdicts
from stepfuse.scripts.oracle_world.world import BASE_ETA, DATA, OBJECTIVES, world_of

FILES = ("world.json", "world.md")
WEIGHTS: dict[int, tuple[tuple[float, ...], ...]] = {
    2: ((0.5, 0.5), (0.8, 0.2)),
    3: ((1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)),
    4: ((0.25, 0.25, 0.25, 0.25), (0.5, 0.25, 0.15, 0.1)),
}


def world_files(folder: Path) -> set[Path]:
    """The files that `measure_world` wrote in a folder, which --overwrite replaces; none where there is no world."""
    try:
        values = read_json(folder / FILES[0], "the figures of a world")
    except ValueError:
        return set()
    return files_named(folder, *FILES) if "verdicts" in values else set()


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
