"""Quality of fronts, computed by moocore: hypervolume, and distance to a reference front. Rewards are maximised."""

from collections.abc import Mapping

import moocore
import numpy as np
from scipy.stats import spearmanr

from stepfuse.scripts.evaluation.cells import Cells
from stepfuse.scripts.evaluation.metric import Statistic, finite, interval, over, ratio

Costs = Mapping[str, Statistic]  # a metric's name → how the figures of several cells are averaged
MARGIN = 0.1  # of the range over all cells, below the smallest mean


def reference_point(points: np.ndarray) -> np.ndarray:
    """Of (cells, objectives) the smallest mean less 10 % of the range, objective by objective."""
    known = _known(points)
    if not len(known):
        return np.full(points.shape[1], np.nan)
    low, high = known.min(0), known.max(0)
    return low - MARGIN * (high - low)


def hypervolumes(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of (draws, cells, objectives) the volume between the front and the reference point, draw by draw.

    Zitzler and Thiele 1998. A mean of draws lies above the estimate: noise pushes a front outwards, one of
    many cells more than one of few. Compare fronts of the same cells.
    """
    indicator = moocore.Hypervolume(ref=reference, maximise=True)
    return np.array([indicator(cells) if len(cells) else np.nan for cells in map(_known, points)])


def distances(points: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """IGD, draw by draw: the mean distance from the non-dominated points of `oracle` to the nearest of `points`.

    Coello Coello and Reyes Sierra 2004. Both are (draws, cells, objectives).
    """
    return np.array([_distance(_known(p), _known(o)) for p, o in zip(points, oracle, strict=True)])


def monotonicity(shares: np.ndarray, means: np.ndarray) -> float | None:
    """Spearman correlation of weights and mean rewards; None for fewer than 3 weights, or one mean throughout."""
    known = np.isfinite(shares) & np.isfinite(means)
    weights, rewards = np.round(shares[known], 9), means[known]
    if len(np.unique(weights)) < 3 or np.ptp(rewards) == 0:
        return None
    return float(spearmanr(weights, rewards).statistic)


def rule_figures(
    table: Cells, grid: list[str], points: np.ndarray, reference: np.ndarray, cells: list[dict], costs: Costs
) -> dict[str, dict]:
    """Every rule's front: its volume, its distance to the oracle's, both against product's, and its costs.

    Args:
        grid: the weights that any rule was measured at.
        points: mean scaled rewards, (draws, cells, objectives).
        reference: of the hypervolume.
        cells: their figures.
    """
    product, oracle = table.where("product"), table.where("oracle")
    volumes = {
        rule: hypervolumes(points[:, table.where(rule)], reference)
        for rule in dict.fromkeys(cell.rule for cell in table.cells)
    }
    figures = {}
    for rule, volume in volumes.items():
        held = table.where(rule)
        full = [i for i in held if table.cells[i].full_strength]
        shares = np.array([table.cells[i].shares for i in full]).reshape(-1, len(table.objectives))
        weights = {table.cells[i].weights for i in held}
        figures[rule] = {
            "cells": len(held),
            "lacks": [] if rule == "base" else [w for w in grid if w not in weights],
            "hypervolume": interval(volume),
            "over_product": None if rule == "product" or not product else interval(volume - volumes["product"]),
            "matched": None if rule == "product" else _matched(table, held, points, reference, cells, costs),
            "igd": interval(distances(points[:, held], points[:, oracle])) if oracle and rule != "oracle" else None,
            "regret": None if rule == "oracle" else _regret(table, full),
            "monotonicity": {
                name: monotonicity(shares[:, k], points[0, full, k]) for k, name in enumerate(table.objectives)
            },
        } | average_costs(costs, cells, held)
    return figures


def average_costs(costs: Costs, cells: list[dict], indices: list[int]) -> dict[str, float | None]:
    """What some cells cost on average."""
    return {name: finite(over(average, (cells[i][name] for i in indices))) for name, average in costs.items()}


def _matched(
    table: Cells,
    held: list[int],
    points: np.ndarray,
    reference: np.ndarray,
    cells: list[dict],
    costs: Costs,
) -> dict | None:
    """A rule against product, over the weights and strengths that both have."""
    pairs = [(i, table.find("product", table.cells[i].weights, table.cells[i].strength)) for i in held]
    both = [(i, j) for i, j in pairs if j is not None]
    if not both:
        return None
    ours, products = [i for i, _ in both], [j for _, j in both]
    difference = hypervolumes(points[:, ours], reference) - hypervolumes(points[:, products], reference)
    spent, by_product = (average_costs(dict.fromkeys(costs, np.mean), cells, indices) for indices in (ours, products))

    return {
        "cells": len(both),
        "mixed": sum(not table.cells[i].one_hot for i in ours),
        "over_product": interval(difference),
    } | {f"{name}_ratio": ratio(spent[name], by_product[name]) for name in costs}


def _regret(table: Cells, full: list[int]) -> dict | None:
    """Mean regret over the mixed weights that an oracle was trained at, and the same less that of product."""

    def mean_gap(pairs: list[tuple[int, int]]) -> dict | None:
        gaps = [table.differences(table.setup.trained_weights(table.cells[i].shares), j, i) for i, j in pairs]
        return interval(table.means(np.stack(gaps)).mean(0)) if gaps else None

    mixed = [i for i in full if not table.cells[i].one_hot]  # all the weight on one adapter is no question of fusion
    trained = [(i, j) for i in mixed if (j := table.find("oracle", table.cells[i].weights)) is not None]
    if not trained:
        return None
    products = [(i, table.find("product", table.cells[i].weights)) for i, _ in trained]
    paired = [(i, j) for i, j in products if j is not None and table.cells[i].rule != "product"]
    return {"weights": len(trained), "mean": mean_gap(trained), "over_product": mean_gap(paired)}


def _distance(points: np.ndarray, oracle: np.ndarray) -> float:
    if not len(points) or not len(oracle):
        return float("nan")
    return moocore.igd(points, ref=moocore.filter_dominated(oracle, maximise=True), maximise=True)


def _known(points: np.ndarray) -> np.ndarray:
    return points[np.isfinite(points).all(1)]
