"""The table of an evaluation, a row an image, as aligned arrays: a cell is one rule, weights and strength."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from stepfuse.rewards.statistics import percentile_interval

Means = Callable[[np.ndarray], np.ndarray]  # (…, images) → (…, 1 + draws)
COSTS = ("nfe", "seconds", "peak_memory_mb")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was measured, and how."""

    objectives: tuple[tuple[str, str], ...]  # (name, reward)
    rewards: tuple[str, ...]  # all of them, those of the objectives and held-out ones
    scales: Mapping[str, float]  # of each objective's reward, the unit it is scalarised in
    held_out: tuple[str, ...] = ()  # those of `rewards` that nothing was trained on
    title: str = "Evaluation"
    base: str = ""
    steps: int
    guidance: float
    machine: str = ""
    command: str = ""
    oracles: tuple[
        tuple[Mapping[str, float], Mapping[str, float]], ...
    ] = ()  # weights and scales of each, by objective

    def __post_init__(self) -> None:
        for name, reward in self.objectives:
            if reward not in self.rewards:
                raise ValueError(f"objective {name!r} has reward {reward!r}; expected one of {list(self.rewards)}")
            if not self.scales.get(reward, 0) > 0:
                raise ValueError(f"reward {reward!r} has scale {self.scales.get(reward)}; expected a positive number")
        if strange := [reward for reward in self.held_out if reward not in self.rewards]:
            raise ValueError(f"held-out reward {strange[0]!r} was not measured; expected one of {list(self.rewards)}")

    def trained_weights(self, shares: np.ndarray) -> np.ndarray:
        """The weights, in units of `scales`, of the reward that the oracle of these weights was trained on.

        Σ w_i r_i / s_i with the scales s of its training is Σ (w_i σ_i / s_i) r_i / σ_i; the sum of weights is kept.
        Where no oracle was trained, or with the same scales, these are the weights themselves.
        """
        for weights, scales in self.oracles:
            own = np.array([weights.get(name, 0.0) for name, _ in self.objectives])
            if abs(own - shares).max() <= 1e-3:  # as the rule finds it
                ratios = [self.scales[reward] / scales.get(name, np.inf) for name, reward in self.objectives]
                trained = shares * np.array(ratios)
                return trained * shares.sum() / trained.sum()
        return shares


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One rule at one strength and weights; `shares` holds NaN where the weights are none or change over steps."""

    rule: str
    weights: str
    strength: float
    shares: np.ndarray = field(repr=False)

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

    cells: tuple[Cell, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Mapping[str, np.ndarray]  # column → (cells, images)
    base: int

    def where(self, rule: str) -> list[int]:
        return [i for i, cell in enumerate(self.cells) if cell.rule == rule]

    def find(self, rule: str, weights: str, strength: float = 1.0) -> int | None:
        """The cell of a rule at these weights and strength."""
        for i in self.where(rule):
            if self.cells[i].weights == weights and abs(self.cells[i].strength - strength) < 1e-6:
                return i
        return None


def arrange(results: pd.DataFrame, setup: Setup) -> Cells:
    """Cells in the order of the table, images in the order of prompts and seeds.

    Raises:
        ValueError: for a missing column, without exactly one cell of rule base, and for a cell of other images.
    """
    shares = [f"w_{name}" for name, _ in setup.objectives]
    measured = [f"reward_{reward}" for reward in setup.rewards]
    measured += ["kl", "diversity", "nfe", "seconds", "peak_memory_mb"]
    identity = ["rule", "weights", "strength"]
    if missing := [c for c in [*identity, *shares, "prompt", "seed", *measured] if c not in results]:
        raise ValueError(f"the results have no column {missing[0]!r}; expected one of that name")
    groups = [
        (
            Cell(rule=rule, weights=weights, strength=float(strength), shares=rows[shares].iloc[0].to_numpy(float)),
            rows.sort_values(["prompt", "seed"]),
        )
        for (rule, weights, strength), rows in results.groupby(identity, sort=False, dropna=False)
    ]
    base = [i for i, (cell, _) in enumerate(groups) if cell.rule == "base"]
    if len(base) != 1:
        raise ValueError(f"the results have {len(base)} cells of rule 'base'; expected one")
    pairs = _pairs(groups[base[0]][1])
    for cell, rows in groups:
        _refuse_others(cell, _pairs(rows), pairs)
    return Cells(
        cells=tuple(cell for cell, _ in groups),
        prompts=tuple(prompt for prompt, _ in pairs),
        seeds=tuple(seed for _, seed in pairs),
        values={column: np.stack([rows[column].to_numpy(float) for _, rows in groups]) for column in measured},
        base=base[0],
    )


def _pairs(rows: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(rows["prompt"].tolist(), rows["seed"].tolist(), strict=True))


def _refuse_others(cell: Cell, pairs: list[tuple[str, int]], expected: list[tuple[str, int]]) -> None:
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise ValueError(f"{cell} holds prompt {twice[0]!r} with seed {twice[1]} more than once; expected it once")
    if pairs != expected:
        only = sorted(set(pairs) ^ set(expected))[0]
        has = "has" if only in pairs else "lacks"
        raise ValueError(f"{cell} {has} prompt {only[0]!r} with seed {only[1]}; expected the images of the base")


def plain(means: np.ndarray) -> dict[str, float | None] | None:
    """An interval as JSON has it; None where there is not even an estimate."""
    interval = percentile_interval(means)
    return {key: number(value) for key, value in vars(interval).items()} if np.isfinite(interval.mean) else None


def number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def over(statistic: Callable[..., Any], values: Iterable[float | None]) -> float:
    """A statistic of what is known among the values."""
    array = np.array(list(values), dtype=np.float64)
    known = array[np.isfinite(array)]
    return float(statistic(known)) if len(known) else float("nan")


def ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None
