"""Paired comparisons of scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean difference and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_interval(
    scores: Sequence[float], baseline: Sequence[float], prompts: Sequence[str], *, seed: int = 0
) -> Interval:
    """Mean of score - baseline over pairs of one prompt and seed, with a bootstrap 95 % interval.

    Prompts are resampled, not pairs: images of one prompt are not independent. Percentile
    bootstrap of 10 000 draws (scipy).

    Raises:
        ValueError: for lists of different lengths, or fewer than two prompts.
    """
    if not len(scores) == len(baseline) == len(prompts):
        raise ValueError(
            f"{len(scores)} scores, {len(baseline)} baselines and {len(prompts)} prompts; expected as many"
        )
    difference = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    names, index = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        raise ValueError("a bootstrap over prompts needs at least two prompts")
    sums, counts = np.bincount(index, difference), np.bincount(index)

    def ratio(total: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return total.sum(axis) / count.sum(axis)

    result = bootstrap(
        (sums, counts), ratio, paired=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(seed)
    )
    interval = result.confidence_interval
    return Interval(mean=float(difference.mean()), low=float(interval.low), high=float(interval.high))
