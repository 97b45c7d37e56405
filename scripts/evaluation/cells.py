"""The table of an evaluation, a row an image, as aligned arrays: a cell is one rule, weights and strength."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from stepfuse.rewards.statistics import Resamples, resample_prompts, resampled_means
from stepfuse.scripts.evaluation.config import Setup
from stepfuse.scripts.evaluation.metrics import all_metrics


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One rule at one strength and weights; `shares` holds NaN where the weights are none or change over steps."""

    rule: str
    weights: str
    strength: float
    shares: np.ndarray = field(repr=False)

    @property
    def weighted(self) -> bool:
        """Whether it has weights, and the same ones at all steps."""
        return bool(np.isfinite(self.shares).all())

    @property
    def one_hot(self) -> bool:
        return bool(self.shares.max() > 1 - 1e-6)

    @property
    def full_strength(self) -> bool:
        return abs(self.strength - 1) < 1e-6

    def __str__(self) -> str:
        return f"cell {self.rule!r}, weights {self.weights!r}, strength {self.strength:g}"


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Column k of every array is the same prompt and seed, row i the cell `cells[i]`."""

    setup: Setup
    cells: tuple[Cell, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Mapping[str, np.ndarray]  # (cells, images) of every metric that was measured
    scaled: np.ndarray  # (objectives, cells, images), the rewards in units of their scales
    base: int
    resamples: Resamples  # of prompts, the same for all that is computed

    @property
    def objectives(self) -> list[str]:
        return [name for name, _ in self.setup.objectives]

    @property
    def grid(self) -> list[str]:
        """The weights that any rule was measured at."""
        return list(dict.fromkeys(cell.weights for cell in self.cells if cell.weighted))

    @property
    def without_oracle(self) -> list[str]:
        """Those of these weights that there is no oracle at."""
        known = {cell.weights for cell in self.cells if self.oracle_of(cell) is not None}
        return [weights for weights in self.grid if weights not in known]

    def where(self, rule: str) -> tuple[int, ...]:
        return tuple(i for i, cell in enumerate(self.cells) if cell.rule == rule)

    def find(self, rule: str, weights: str, strength: float = 1.0) -> int | None:
        """The index of the cell of a rule at these weights and strength."""
        cells = ((i, self.cells[i]) for i in self.where(rule))
        return next((i for i, cell in cells if cell.weights == weights and abs(cell.strength - strength) < 1e-6), None)

    @cached_property
    def points(self) -> np.ndarray:
        """Mean scaled rewards, (1 + draws, cells, objectives)."""
        return self.means(self.scaled).transpose(2, 1, 0)

    def oracle_of(self, cell: Cell) -> int | None:
        """The oracle at the weights of a cell; for one adapter alone that adapter, unless another was trained."""
        if not cell.weighted:
            return None
        trained = self.find("oracle", cell.weights)
        return self.find("product", cell.weights) if trained is None and cell.one_hot else trained

    @cached_property
    def gains(self) -> list[np.ndarray]:
        """Means (1 + draws,) of Σ w_i (r_i − r_i,base)/σ_i of each cell, NaN without constant weights."""
        return [self._gap(cell.shares, i, self.base) for i, cell in enumerate(self.cells)]

    def mean_kl(self, i: int | None) -> np.ndarray | None:
        """Means (1 + draws,) of the KL to the base of a cell; None where it was not measured."""
        if i is None or "kl" not in self.values:
            return None
        means = self.means(self.values["kl"][i])
        return means if np.isfinite(means[0]) else None

    @cached_property
    def regrets(self) -> list[np.ndarray | None]:
        """Means (1 + draws,) of what each cell's oracle has more, by the reward that it was trained on."""
        weights = [self.setup.trained_weights(cell.shares) for cell in self.cells]
        return [self.gap(weights[i], self.oracle_of(cell), i) for i, cell in enumerate(self.cells)]

    def means(self, values: np.ndarray) -> np.ndarray:
        """(…, images) → (…, 1 + draws): the means of the images, then of every bootstrap draw."""
        return resampled_means(values, self.resamples)

    def gap(self, weights: np.ndarray, better: int | None, worse: int | None) -> np.ndarray | None:
        """Means (1 + draws,) of Σ w_i (r_i − r'_i)/σ_i between two cells; None where one of them is missing."""
        return None if better is None or worse is None else self._gap(weights, better, worse)

    def _gap(self, weights: np.ndarray, better: int, worse: int) -> np.ndarray:
        return self.means(np.tensordot(weights, self.scaled[:, better] - self.scaled[:, worse], 1))


def arrange(results: pd.DataFrame, setup: Setup, *, draws: int = 2000, seed: int = 0) -> Cells:
    """Cells in the order of the table, images in the order of prompts and seeds, metrics that the table has.

    Raises:
        ValueError: for a missing column, other than one cell of rule base, and a cell of other images.
    """
    identity, shares = ["rule", "weights", "strength"], [f"w_{name}" for name, _ in setup.objectives]
    needed = [*identity, *shares, "prompt", "seed", *(f"reward_{reward}" for reward in setup.rewards)]
    if missing := [column for column in needed if column not in results]:
        raise ValueError(f"the results have no column {missing[0]!r}; expected one of that name")
    cells, tables = [], []
    for (rule, weights, strength), rows in results.groupby(identity, sort=False, dropna=False):
        of_objectives = rows[shares].iloc[0].to_numpy(float)
        cells.append(Cell(rule=rule, weights=weights, strength=float(strength), shares=of_objectives))
        tables.append(rows.sort_values(["prompt", "seed"]))
    base = [i for i, cell in enumerate(cells) if cell.rule == "base"]
    if len(base) != 1:
        raise ValueError(f"the results have {len(base)} cells of rule 'base'; expected one")
    pairs = _pairs(tables[base[0]])
    for cell, rows in zip(cells, tables, strict=True):
        _check_images(cell, _pairs(rows), pairs)
    values = {
        metric.name: np.stack([rows[metric.name].to_numpy(float) for rows in tables])
        for metric in all_metrics(setup.rewards)
        if metric.name in results
    }
    prompts, seeds = zip(*pairs, strict=True)
    return Cells(
        setup=setup,
        cells=tuple(cells),
        prompts=prompts,
        seeds=seeds,
        values=values,
        scaled=np.stack([values[f"reward_{reward}"] / setup.scales[reward] for _, reward in setup.objectives]),
        base=base[0],
        resamples=resample_prompts(prompts, draws=draws, seed=seed),
    )


def _pairs(rows: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(rows["prompt"].tolist(), rows["seed"].tolist(), strict=True))


def _check_images(cell: Cell, pairs: list[tuple[str, int]], expected: list[tuple[str, int]]) -> None:
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise ValueError(f"{cell} holds prompt {twice[0]!r} with seed {twice[1]} more than once; expected it once")
    if pairs != expected:
        only = sorted(set(pairs) ^ set(expected))[0]
        has = "has" if only in pairs else "lacks"
        raise ValueError(f"{cell} {has} prompt {only[0]!r} with seed {only[1]}; expected the images of the base")
