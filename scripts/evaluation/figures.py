"""The figures of an evaluation: every cell against the base and the oracle, every rule's front against product's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from stepfuse.rewards.statistics import paired_interval, resample_prompts, resampled_means
from stepfuse.scripts.evaluation.cells import COSTS, Cell, Cells, Means, Setup, arrange, number, over, plain, ratio
from stepfuse.scripts.evaluation.fronts import reference_point, rule_figures


def summarise(results: pd.DataFrame, setup: Setup, *, draws: int = 2000, seed: int = 0) -> dict:
    """Figures of a table of images, as plain JSON values; an interval is {"mean", "low", "high"}, None what is unknown.

    Intervals are 95 % percentile bootstraps over prompts. All but the gains of single rewards (`paired_interval`)
    are computed from the same `draws` samples of prompts, so differences between cells and rules are paired.

    Raises:
        ValueError: as `arrange`, and for fewer than two prompts.
    """
    table = arrange(results, setup)
    resamples = resample_prompts(table.prompts, draws=draws, seed=seed)

    def means(values: np.ndarray) -> np.ndarray:
        return resampled_means(values, resamples)

    scaled = np.stack([table.values[f"reward_{reward}"] / setup.scales[reward] for _, reward in setup.objectives])
    points = means(scaled).transpose(2, 1, 0)  # draws, cells, objectives
    reference = reference_point(points[0])
    cells = _cells(table, setup, scaled, means, seed)
    names = [name for name, _ in setup.objectives]
    grid = list(dict.fromkeys(c.weights for c in table.cells if np.isfinite(c.shares).all()))
    return {
        "prompts": len(set(table.prompts)),
        "seeds": len(set(table.seeds)),
        "images": len(table.prompts),
        "draws": draws,
        "objectives": dict(setup.objectives),
        "rewards": list(setup.rewards),
        "held_out": list(setup.held_out),
        "scales": {reward: float(setup.scales[reward]) for _, reward in setup.objectives},
        "grid": grid,
        "reference": dict(zip(names, reference.tolist(), strict=True)),
        "one_adapter": _one_adapter(table, cells),
        "cells": cells,
        "rules": rule_figures(table, names, grid, scaled, points, reference, means, cells, setup.trained_weights),
    }


def oracle_of(table: Cells, cell: Cell) -> int | None:
    """The oracle at the weights of a cell; one adapter alone is its own oracle where no other was trained."""
    if not np.isfinite(cell.shares).all():
        return None
    trained = table.find("oracle", cell.weights)
    return table.find("product", cell.weights) if trained is None and cell.one_hot else trained


def _cells(table: Cells, setup: Setup, scaled: np.ndarray, means: Means, seed: int) -> list[dict]:
    base, names = table.base, [name for name, _ in setup.objectives]

    def gap(weights: np.ndarray, better: int | None, worse: int | None) -> dict | None:
        """Σ w_i (r_i − r'_i)/σ_i between two cells."""
        if better is None or worse is None:
            return None
        return plain(means(np.tensordot(weights, scaled[:, better] - scaled[:, worse], 1)))

    diversity = means(table.values["diversity"])
    figures: list[dict[str, Any]] = []
    for i, cell in enumerate(table.cells):
        oracle = oracle_of(table, cell)
        weighted = bool(np.isfinite(cell.shares).all())
        product = table.find("product", cell.weights, cell.strength) if cell.rule != "product" else None
        figures.append(
            {
                "rule": cell.rule,
                "weights": cell.weights,
                "strength": number(cell.strength),
                "shares": dict(zip(names, cell.shares.tolist(), strict=True)) if weighted else None,
                "images": len(table.prompts),
                "rewards": {r: _reward(table, i, f"reward_{r}", means, seed) for r in setup.rewards},
                "scalarised_gain": gap(cell.shares, i, base),
                "oracle": None if oracle is None else table.cells[oracle].rule,
                "regret": None if oracle is None else gap(setup.trained_weights(cell.shares), oracle, i),
                "over_product": gap(cell.shares, i, product),
                "diversity": plain(diversity[i]),
                "diversity_ratio": plain(diversity[i] / np.where(diversity[base] > 0, diversity[base], np.nan)),
                "kl": plain(means(table.values["kl"][i])),
                "nfe": number(over(np.mean, table.values["nfe"][i])),
                "seconds": number(over(np.median, table.values["seconds"][i])),
                "seconds_p95": number(over(lambda v: np.percentile(v, 95), table.values["seconds"][i])),
                "peak_memory_mb": number(over(np.max, table.values["peak_memory_mb"][i])),
            }
        )
    one = _one_adapter(table, figures)
    for figure in figures:
        figure["of_one_adapter"] = {cost: ratio(figure[cost], one[cost] if one else None) for cost in COSTS}
    return figures


def _reward(table: Cells, i: int, column: str, means: Means, seed: int) -> dict:
    """Mean of one reward in one cell; gain and share of wins over the base, from pairs that both have a score."""
    values, base = table.values[column][i], table.values[column][table.base]
    figures = {"missing": int((~np.isfinite(values)).sum()), "mean": plain(means(values)), "gain": None, "wins": None}
    pairs = np.isfinite(values) & np.isfinite(base)
    prompts = np.asarray(table.prompts)[pairs]
    if i != table.base and len(set(prompts.tolist())) > 1:
        won = np.where(pairs, np.heaviside(values - base, 0.5), np.nan)
        gain = paired_interval(values[pairs].tolist(), base[pairs].tolist(), prompts.tolist(), seed=seed)
        figures |= {"gain": vars(gain), "wins": plain(means(won))}
    return figures


def _one_adapter(table: Cells, figures: list[dict]) -> dict | None:
    """What one trained adapter costs: rule product at strength 1 with all the weight on one objective."""
    alone = [i for i in table.where("product") if table.cells[i].one_hot and table.cells[i].full_strength]
    if not alone:
        return None
    average: dict[str, Callable[..., Any]] = {"nfe": np.mean, "seconds": np.median, "peak_memory_mb": np.mean}
    return {cost: number(over(average[cost], (figures[i][cost] for i in alone))) for cost in COSTS}
