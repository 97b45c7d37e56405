"""Quality of fronts, computed by moocore: hypervolume, and distance to a reference front. Rewards are maximised."""

from collections.abc import Callable

import moocore
import numpy as np
from scipy.stats import spearmanr

from stepfuse.scripts.evaluation.cells import Cells, Means, number, over, plain, ratio

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
    table: Cells,
    names: list[str],
    grid: list[str],
    scaled: np.ndarray,
    points: np.ndarray,
    reference: np.ndarray,
    means: Means,
    cells: list[dict],
    trained_weights: Callable[[np.ndarray], np.ndarray],
) -> dict[str, dict]:
    """Every rule's front: its volume, its distance to the oracle's, and both against product's."""
    product, oracle = table.where("product"), table.where("oracle")
    volume = {
        rule: hypervolumes(points[:, table.where(rule)], reference)
        for rule in dict.fromkeys(cell.rule for cell in table.cells)
    }
    figures = {}
    for rule, own in volume.items():
        held = table.where(rule)
        full = [i for i in held if table.cells[i].full_strength]
        shares = np.stack([table.cells[i].shares for i in full]) if full else np.empty((0, len(names)))
        other = None if rule == "product" or not product else own - volume["product"]
        figures[rule] = {
            "cells": len(held),
            "lacks": [] if rule == "base" else [w for w in grid if w not in {table.cells[i].weights for i in held}],
            "hypervolume": plain(own),
            "over_product": None if other is None else plain(other),
            "matched": None if rule == "product" else _matched(table, held, points, reference, cells),
            "igd": plain(distances(points[:, held], points[:, oracle])) if oracle and rule != "oracle" else None,
            "regret": None if rule == "oracle" else _regret(table, full, scaled, means, trained_weights),
            "monotonicity": {name: monotonicity(shares[:, k], points[0, full, k]) for k, name in enumerate(names)},
            "nfe": number(over(np.mean, (cells[i]["nfe"] for i in held))),
            "seconds": number(over(np.median, (cells[i]["seconds"] for i in held))),
        }
    return figures


def _matched(
    table: Cells, held: list[int], points: np.ndarray, reference: np.ndarray, cells: list[dict]
) -> dict | None:
    """A rule against product, over the weights and strengths that both have."""
    pairs = [(i, table.find("product", table.cells[i].weights, table.cells[i].strength)) for i in held]
    both = [(i, j) for i, j in pairs if j is not None]
    if not both:
        return None
    mine, theirs = [i for i, _ in both], [j for _, j in both]
    difference = hypervolumes(points[:, mine], reference) - hypervolumes(points[:, theirs], reference)

    def cost_ratio(cost: str) -> float | None:
        mean = [number(over(np.mean, (cells[i][cost] for i in c))) for c in (mine, theirs)]
        return ratio(*mean)

    return {
        "cells": len(both),
        "mixed": sum(not table.cells[i].one_hot for i in mine),
        "over_product": plain(difference),
        "nfe_ratio": cost_ratio("nfe"),
        "seconds_ratio": cost_ratio("seconds"),
    }


def _regret(
    table: Cells,
    full: list[int],
    scaled: np.ndarray,
    means: Means,
    trained_weights: Callable[[np.ndarray], np.ndarray],
) -> dict | None:
    """Mean regret over the mixed weights that an oracle was trained at, and the same less that of product."""

    def mean_gap(pairs: list[tuple[int, int]]) -> dict | None:
        gaps = [np.tensordot(trained_weights(table.cells[i].shares), scaled[:, j] - scaled[:, i], 1) for i, j in pairs]
        return plain(means(np.stack(gaps)).mean(0)) if gaps else None

    mixed = [i for i in full if not table.cells[i].one_hot]  # all the weight on one adapter is no question of fusion
    trained = [(i, j) for i in mixed if (j := table.find("oracle", table.cells[i].weights)) is not None]
    if not trained:
        return None
    rivals = [(i, table.find("product", table.cells[i].weights)) for i, _ in trained]
    paired = [(i, j) for i, j in rivals if j is not None and table.cells[i].rule != "product"]
    return {"weights": len(trained), "mean": mean_gap(trained), "over_product": mean_gap(paired)}


def _distance(points: np.ndarray, oracle: np.ndarray) -> float:
    if not len(points) or not len(oracle):
        return float("nan")
    return moocore.igd(points, ref=moocore.filter_dominated(oracle, maximise=True), maximise=True)


def _known(points: np.ndarray) -> np.ndarray:
    return points[np.isfinite(points).all(1)]
