"""The figures of an evaluation: every cell against the base and the oracle, every rule's front against product's.

Fronts are measured by moocore: hypervolume, and distance to a reference front. Rewards are maximised.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import moocore
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from stepfuse.scripts.evaluation.cells import Cells, arrange
from stepfuse.scripts.evaluation.config import Setup
from stepfuse.scripts.evaluation.metric import CellValues, Metric, Statistic, finite, interval, over, ratio
from stepfuse.scripts.evaluation.metrics import all_metrics
from stepfuse.scripts.evaluation.shares import cell_shares, rule_shares

Costs = Mapping[str, Statistic]  # a metric's name → how the figures of several cells are averaged
Indices = tuple[int, ...]  # of cells
MARGIN = 0.1


def summarise(results: pd.DataFrame, setup: Setup, *, draws: int = 2000, seed: int = 0) -> dict:
    """Figures of a table of images, as plain JSON values; an interval is {"mean", "low", "high"}, None what is unknown.

    Intervals are 95 % percentile bootstraps over prompts. All but the gains of single rewards (`paired_interval`) are
    computed from the same `draws` samples of prompts, so differences are paired. Raises ValueError as `arrange`.
    """
    table = arrange(results, setup, draws=draws, seed=seed)
    metrics = [metric for metric in all_metrics(setup.rewards) if metric.name in table.values]
    costs = {metric.name: metric.over_cells for metric in metrics if metric.over_cells is not None}
    # Of the hypervolume, the same for all rules and draws: the smallest mean less 10 % of the range, by objective.
    means = _known(table.points[0]) if len(_known(table.points[0])) else table.points[0]
    reference = means.min(0) - MARGIN * np.ptp(means, 0)
    cells = [_cell(table, i, metrics) for i in range(len(table.cells))]
    # One trained adapter: rule product at strength 1 with all the weight on one objective.
    single = [i for i in table.where("product") if table.cells[i].one_hot and table.cells[i].full_strength]
    one_adapter = average_costs(costs, cells, single) if single else None
    for figures in cells:
        figures["of_one_adapter"] = {name: ratio(figures[name], (one_adapter or {}).get(name)) for name in costs}
    of_rules = {metric.name: costs[metric.name] for metric in metrics if metric.of_rules}
    return {
        "prompts": len(set(table.prompts)),
        "seeds": len(set(table.seeds)),
        "images": len(table.prompts),
        "draws": draws,
        "objectives": dict(setup.objectives),
        "rewards": list(setup.rewards),
        "held_out": list(setup.held_out),
        "judges": list(setup.judges),
        "scales": {reward: float(setup.scales[reward]) for _, reward in setup.objectives},
        "grid": table.grid,
        "without_oracle": table.without_oracle,
        "sets": dict(setup.sets),
        "reference": dict(zip(table.objectives, reference.tolist(), strict=True)),
        "one_adapter": one_adapter,
        "cells": cells,
        "rules": rule_figures(table, reference, cells, of_rules),
    }


def _cell(table: Cells, i: int, metrics: list[Metric]) -> dict[str, Any]:
    """The figures of one cell, but for those that are multiples of one adapter's."""
    cell = table.cells[i]
    oracle = table.oracle_of(cell)
    product = table.find("product", cell.weights, cell.strength) if cell.rule != "product" else None
    figures: dict[str, Any] = {
        "rule": cell.rule,
        "weights": cell.weights,
        "strength": finite(cell.strength),
        "shares": dict(zip(table.objectives, cell.shares.tolist(), strict=True)) if cell.weighted else None,
        "images": len(table.prompts),
        "scalarised_gain": interval(table.gains[i]),
        "oracle": None if oracle is None else table.cells[oracle].rule,
        "regret": interval(table.regrets[i]),
        "over_product": interval(table.gap(cell.shares, i, product)),
    } | cell_shares(table, i)
    for metric in metrics:
        column = table.values[metric.name]
        values = CellValues(
            values=column[i], base=column[table.base], is_base=i == table.base, prompts=table.prompts, means=table.means
        )
        for figure in metric.figures:
            if figure.aggregate is not None:
                figure.store(figures, figure.aggregate(values))
    return figures


def distances(points: np.ndarray, fronts: Sequence[np.ndarray]) -> np.ndarray:
    """IGD (Coello Coello and Reyes Sierra 2004) by draw: mean distance from a front's points to the nearest point."""
    pairs = zip(map(_known, points), fronts, strict=True)
    return np.array([moocore.igd(p, ref=o, maximise=True) if len(p) and len(o) else np.nan for p, o in pairs])


def monotonicity(shares: np.ndarray, means: np.ndarray) -> float | None:
    """Spearman correlation of weights and mean rewards; None for fewer than 3 weights, or one mean throughout."""
    known = np.isfinite(shares) & np.isfinite(means)
    weights, rewards = np.round(shares[known], 9), means[known]
    if len(np.unique(weights)) < 3 or np.ptp(rewards) == 0:
        return None
    return float(spearmanr(weights, rewards).statistic)


def rule_figures(table: Cells, reference: np.ndarray, cells: list[dict], costs: Costs) -> dict[str, dict]:
    """Every rule's front: its volume above the reference, its distance to the oracle's, and its costs."""

    indicator = moocore.Hypervolume(ref=reference, maximise=True)

    @cache
    def volume(indices: Indices) -> np.ndarray:
        """By draw, between the front of these cells and the reference point (Zitzler and Thiele 1998).

        A mean of draws lies above the estimate: noise pushes a front outwards, one of many cells more than one of few.
        Compare fronts of the same cells.
        """
        points = map(_known, table.points[:, indices])
        return np.array([indicator(cells) if len(cells) else np.nan for cells in points])

    product, oracle = table.where("product"), table.where("oracle")
    fronts = [moocore.filter_dominated(o, maximise=True) if len(o) else o for o in map(_known, table.points[:, oracle])]
    figures = {}
    for rule in dict.fromkeys(cell.rule for cell in table.cells):
        held = table.where(rule)
        full = [i for i in held if table.cells[i].full_strength]
        shares = np.array([table.cells[i].shares for i in full]).reshape(-1, len(table.objectives))
        weights = {table.cells[i].weights for i in held}
        compared = product and rule != "product"
        figures[rule] = {
            "cells": len(held),
            "lacks": [] if rule == "base" else [w for w in table.grid if w not in weights],
            "hypervolume": interval(volume(held)),
            "over_product": interval(volume(held) - volume(product)) if compared else None,
            "matched": _matched(table, held, volume, cells, costs) if compared else None,
            "igd": interval(distances(table.points[:, held], fronts)) if oracle and rule != "oracle" else None,
            "regret": _mean_regret(table, full) if rule != "oracle" else None,
            **rule_shares(table, held, full),
            "training_images": table.setup.training_images.get(rule),
            "monotonicity": {
                name: monotonicity(shares[:, k], table.points[0, full, k]) for k, name in enumerate(table.objectives)
            },
        } | average_costs(costs, cells, held)
    return figures


def average_costs(costs: Costs, cells: list[dict], indices: Sequence[int]) -> dict[str, float | None]:
    """What some cells cost on average."""
    return {name: over(average, (cells[i][name] for i in indices)) for name, average in costs.items()}


def _matched(
    table: Cells, held: Indices, volume: Callable[[Indices], np.ndarray], cells: list[dict], costs: Costs
) -> dict | None:
    """A rule against product, over the weights and strengths that both have."""
    pairs = {i: table.find("product", table.cells[i].weights, table.cells[i].strength) for i in held}
    ours = tuple(i for i, j in pairs.items() if j is not None)
    products = tuple(j for j in pairs.values() if j is not None)
    if not ours:
        return None
    spent, by_product = (average_costs(dict.fromkeys(costs, np.mean), cells, indices) for indices in (ours, products))
    return {
        "cells": len(ours),
        "mixed": sum(not table.cells[i].one_hot for i in ours),
        "over_product": interval(volume(ours) - volume(products)),
    } | {f"{name}_ratio": ratio(spent[name], by_product[name]) for name in costs}


def _mean_regret(table: Cells, full: Sequence[int]) -> dict | None:
    """Mean regret over the mixed weights that an oracle was trained at, and the same less that of product."""
    known = {  # all the weight on one adapter is no question of fusion
        i: regret for i in full if (regret := table.regrets[i]) is not None and not table.cells[i].one_hot
    }
    if not known:
        return None
    products = {i: table.find("product", table.cells[i].weights) for i in known if table.cells[i].rule != "product"}
    gaps = [table.gap(table.setup.trained_weights(table.cells[i].shares), j, i) for i, j in products.items()]
    paired = [gap for gap in gaps if gap is not None]
    return {
        "weights": len(known),
        "mean": interval(np.mean([*known.values()], axis=0)),
        "over_product": interval(np.mean(paired, axis=0)) if paired else None,
    }


def _known(points: np.ndarray) -> np.ndarray:
    return points[np.isfinite(points).all(1)]
