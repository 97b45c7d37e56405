"""Paired comparisons of scores, and bootstrap confidence intervals over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean or another statistic of scores, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def paired_interval(
    scores: Sequence[float], baseline: Sequence[float], prompts: Sequence[str], *, seed: int = 0
) -> Interval:
    """Return the mean of score - baseline over pairs of the same prompt and seed, with a 95 % confidence interval.

    The interval is a percentile bootstrap with 10,000 resamples (`scipy.stats.bootstrap`) of prompts, because images of
    one prompt are not independent. The sequences have one element per image; if their lengths differ, or there are
    fewer than two distinct prompts, ValueError is raised.
    """
    if not len(scores) == len(baseline) == len(prompts):
        raise ValueError(
            f"got {len(scores)} scores, {len(baseline)} baselines and {len(prompts)} prompts; expected equal numbers"
        )
    difference = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    index = _prompt_index(prompts)
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
    """Bootstrap resamples of prompts. Statistics computed from the same resamples have paired differences.

    Attributes:
        prompt: Index of each image's prompt, of shape (images,).
        counts: How often each resample contains each prompt, of shape (1 + draws, prompts). Row 0 contains every prompt
            once, so statistics of row 0 are the estimates.
    """

    prompt: np.ndarray
    counts: np.ndarray


def resample_prompts(prompts: Sequence[str], *, draws: int, seed: int = 0) -> Resamples:
    """Draw bootstrap resamples of the distinct prompts of images, or raise ValueError if there are fewer than two."""
    index = _prompt_index(prompts)
    number = index.max() + 1
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    return Resamples(prompt=index, counts=np.concatenate([np.ones((1, number)), drawn]))


def resampled_means(values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Return means (…, 1 + draws) over images of values (…, images): the estimate, followed by the resamples.

    Values that are not finite are ignored. The means of resamples are NaN if fewer than two prompts have values.
    """
    member = resamples.prompt[:, None] == np.arange(resamples.counts.shape[1])
    measured = np.isfinite(values)
    sums = np.where(measured, values, 0.0) @ member
    sizes = measured.astype(np.float64) @ member
    with np.errstate(invalid="ignore"):  # 0/0 if a resample has no values
        means = (sums @ resamples.counts.T) / (sizes @ resamples.counts.T)
    means[(sizes > 0).sum(-1) < 2, 1:] = np.nan
    return means


def percentile_interval(means: np.ndarray) -> Interval:
    """Return element 0 of (1 + draws,) means with the 2.5 and 97.5 percentiles of the others, NaN if none is finite."""
    drawn = means[1:][np.isfinite(means[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return Interval(mean=float(means[0]), low=float(low), high=float(high))


def deviation_within(values: Sequence[float] | np.ndarray, prompts: Sequence[str]) -> float:
    """Return the standard deviation σ within prompts: σ² is the mean over prompts of the sample variance.

    Values that are not finite, and prompts with fewer than two finite values, are ignored; NaN if no prompt remains.
    """
    import pandas as pd  # the import takes a second, and intervals do without

    table = pd.DataFrame({"value": np.asarray(values, dtype=float), "prompt": list(prompts)})
    finite = table[np.isfinite(table["value"])]
    return float(finite.groupby("prompt")["value"].var(ddof=1).mean() ** 0.5)


def _prompt_index(prompts: Sequence[str]) -> np.ndarray:
    """Index of each image's prompt among the distinct prompts, of which there must be two or more."""
    names, index = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} distinct prompts; a bootstrap over prompts needs at least two prompts")
    return index
