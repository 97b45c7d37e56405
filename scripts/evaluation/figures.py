"""The figures of an evaluation: every cell against the base and the oracle, every rule's front against product's."""

from typing import Any

import numpy as np
import pandas as pd

from stepfuse.scripts.evaluation.cells import Cell, Cells, arrange
from stepfuse.scripts.evaluation.fronts import average_costs, reference_point, rule_figures
from stepfuse.scripts.evaluation.metric import Metric, finite, interval, ratio
from stepfuse.scripts.evaluation.metrics import all_metrics
from stepfuse.scripts.evaluation.setup import Setup


def summarise(results: pd.DataFrame, setup: Setup, *, draws: int = 2000, seed: int = 0) -> dict:
    """Figures of a table of images, as plain JSON values; an interval is {"mean", "low", "high"}, None what is unknown.

    Intervals are 95 % percentile bootstraps over prompts. All but the gains of single rewards (`paired_interval`) are
    computed from the same `draws` samples of prompts, so differences are paired. Raises ValueError as `arrange`.
    """
    table = arrange(results, setup, draws=draws, seed=seed)
    metrics = [metric for metric in all_metrics(setup.rewards) if metric.name in table.values]
    costs = {metric.name: metric.over_cells for metric in metrics if metric.over_cells is not None}
    reference = reference_point(table.points[0])
    regrets = [_regret(table, i) for i in range(len(table.cells))]
    cells = [_cell(table, i, metrics, regret) for i, regret in enumerate(regrets)]
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
        "scales": {reward: float(setup.scales[reward]) for _, reward in setup.objectives},
        "grid": table.grid,
        "reference": dict(zip(table.objectives, reference.tolist(), strict=True)),
        "one_adapter": one_adapter,
        "cells": cells,
        "rules": rule_figures(table, reference, cells, regrets, of_rules),
    }


def _oracle_of(table: Cells, cell: Cell) -> int | None:
    """The oracle at the weights of a cell; for one adapter alone that adapter, unless another was trained."""
    if not cell.weighted:
        return None
    trained = table.find("oracle", cell.weights)
    return table.find("product", cell.weights) if trained is None and cell.one_hot else trained


def _regret(table: Cells, i: int) -> np.ndarray | None:
    """Bootstrap means of what the oracle at a cell's weights has more, by the reward that it was trained on."""
    cell = table.cells[i]
    return table.gap(table.setup.trained_weights(cell.shares), _oracle_of(table, cell), i)


def _cell(table: Cells, i: int, metrics: list[Metric], regret: np.ndarray | None) -> dict[str, Any]:
    """The figures of one cell, but for those that are multiples of one adapter's."""
    cell = table.cells[i]
    oracle = _oracle_of(table, cell)
    product = table.find("product", cell.weights, cell.strength) if cell.rule != "product" else None
    figures: dict[str, Any] = {
        "rule": cell.rule,
        "weights": cell.weights,
        "strength": finite(cell.strength),
        "shares": dict(zip(table.objectives, cell.shares.tolist(), strict=True)) if cell.weighted else None,
        "images": len(table.prompts),
        "scalarised_gain": interval(table.gap(cell.shares, i, table.base)),
        "oracle": None if oracle is None else table.cells[oracle].rule,
        "regret": interval(regret),
        "over_product": interval(table.gap(cell.shares, i, product)),
    }
    for metric in metrics:
        values = table.of_metric(metric.name, i)
        for figure in metric.figures:
            if figure.aggregate is not None:
                figure.store(figures, figure.aggregate(values))
    return figures
