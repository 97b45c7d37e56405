"""Paired comparisons of scores, and one bootstrap over prompts for all that is computed from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import bootstrap


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, or another number computed from scores, and its 95 % confidence interval."""

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


@dataclass(frozen=True, kw_only=True)
class Resamples:
    """Draws of prompts with replacement, shared by all that is computed from them, so that differences are paired.

    The first "draw" holds every prompt once: what is computed from it is the estimate.
    """

    prompt: np.ndarray  # of each image, the index of its prompt
    counts: np.ndarray  # (1 + draws, prompts): how often a draw holds a prompt


def resample_prompts(prompts: Sequence[str], *, draws: int, seed: int = 0) -> Resamples:
    """`draws` bootstrap samples of the distinct prompts of some images.

    Raises:
        ValueError: for fewer than two prompts.
    """
    names, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        raise ValueError("a bootstrap over prompts needs at least two prompts")
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return Resamples(prompt=prompt, counts=np.concatenate([np.ones((1, len(names))), drawn]))


def resampled_means(values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Means of (…, images) as (…, 1 + draws): over the images as they are, then draw by draw.

    What is not finite was not measured and is left out. The draws are NaN where fewer than two prompts were measured.
    """
    member = resamples.prompt[:, None] == np.arange(resamples.counts.shape[1])
    measured = np.isfinite(values)
    sums = np.where(measured, values, 0.0) @ member
    sizes = measured.astype(np.float64) @ member
    with np.errstate(invalid="ignore"):  # 0/0: a draw in which nothing was measured
        means = (sums @ resamples.counts.T) / (sizes @ resamples.counts.T)
    means[(sizes > 0).sum(-1) < 2, 1:] = np.nan
    return means


def percentile_interval(means: np.ndarray) -> Interval:
    """Of (1 + draws,) values the first, with the percentiles 2.5 and 97.5 of the others (NaN where there are none)."""
    drawn = means[1:][np.isfinite(means[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return Interval(mean=float(means[0]), low=float(low), high=float(high))


def deviation_within(values: Sequence[float] | np.ndarray, prompts: Sequence[str]) -> float:
    """The standard deviation among the values of one prompt: σ² is the mean over prompts of their sample variance.

    Values that are not finite are left out, and prompts with fewer than two; NaN where no prompt is left.
    """
    table = pd.DataFrame({"value": np.asarray(values, dtype=float), "prompt": list(prompts)})
    finite = table[np.isfinite(table["value"])]
    return float(finite.groupby("prompt")["value"].var(ddof=1).mean() ** 0.5)
