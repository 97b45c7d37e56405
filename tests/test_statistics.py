"""Intervals of paired differences against simulations whose truth is known."""

import numpy as np
import pytest
from scipy.stats import binom, bootstrap

from stepfuse.rewards.statistics import (
    deviation_within,
    paired_interval,
    percentile_interval,
    resample_prompts,
    resampled_means,
)
from tests.fixtures_tiny import refused

IMAGES = 4  # of each prompt


def simulated(seed, *, prompts=30, gain=0.3, between=1.0, within=0.5):
    """Scores, baselines and prompts: the gain differs from prompt to prompt, and a little from image to image."""
    generator = np.random.default_rng(seed)
    names = [f"prompt {i}" for i in range(prompts) for _ in range(IMAGES)]
    baseline = generator.normal(0, 5, prompts * IMAGES)
    effect = np.repeat(generator.normal(gain, between, prompts), IMAGES)
    return baseline + effect + generator.normal(0, within, prompts * IMAGES), baseline, names


def width(interval):
    return interval.high - interval.low


def test_intervals_hold_the_truth_about_95_times_in_100():
    """Of 200, as many as 95 % gives with a probability of 0.999; 92 % is what the percentile bootstrap of 30 has."""
    held = 0
    for seed in range(200):
        interval = paired_interval(*simulated(seed), seed=seed)
        held += interval.low <= 0.3 <= interval.high
    assert binom.ppf(0.0005, 200, 0.92) <= held <= binom.ppf(0.9995, 200, 0.95)


def test_intervals_that_take_images_of_a_prompt_for_independent_do_not_hold_the_truth_so_often():
    """The design effect of four images a prompt of variances 1 and 0.25 is 1 + 3·0.8 = 3.4: √3.4 = 1.84 in width."""
    ratios = []
    for seed in range(10):
        scores, baseline, prompts = simulated(seed)
        singles = [f"{prompt}, image {i}" for i, prompt in enumerate(prompts)]
        ratios.append(
            width(paired_interval(scores, baseline, prompts)) / width(paired_interval(scores, baseline, singles))
        )
    assert np.mean(ratios) == pytest.approx(1.84, rel=0.1)


def test_the_width_is_that_of_the_normal_interval():
    """For many prompts: 2 · 1.96 · σ / √n, with σ² = 1 + 0.25/4 between the means of prompts."""
    widths = [width(paired_interval(*simulated(seed, prompts=400))) for seed in range(5)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (1 + 0.25 / 4) ** 0.5 / 400**0.5, rel=0.1)


def test_the_mean_is_that_of_the_differences_and_pairs_cancel_what_they_share():
    scores, baseline, prompts = [3.0, 5.0, 10.0, 2.0], [1.0, 4.0, 10.0, 5.0], ["a", "a", "b", "c"]
    interval = paired_interval(scores, baseline, prompts)
    assert interval.mean == (2 + 1 + 0 - 3) / 4
    assert interval.low <= interval.mean <= interval.high
    shifted = paired_interval([s + 1000 for s in scores], [b + 1000 for b in baseline], prompts)
    assert (shifted.mean, shifted.low, shifted.high) == (interval.mean, interval.low, interval.high)


def test_two_prompts_give_the_interval_between_their_means():
    """Resampled in pairs they give 1, 2 and 3 with probabilities 1/4, 1/2 and 1/4."""
    interval = paired_interval([1.0, 1.0, 3.0, 3.0], [0.0] * 4, ["a", "a", "b", "b"])
    assert (interval.low, interval.mean, interval.high) == (1, 2, 3)


def test_a_policy_against_itself_differs_by_nothing():
    interval = paired_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ["a", "b", "c"])
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)
    assert str(interval) == "+0 [+0, +0]"


def test_an_interval_is_that_of_its_seed_whatever_the_order_of_pairs():
    scores, baseline, prompts = simulated(0)
    first = paired_interval(scores, baseline, prompts, seed=1)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = paired_interval(scores[order], baseline[order], [prompts[i] for i in order], seed=1)
    assert (shuffled.low, shuffled.high) == pytest.approx((first.low, first.high), rel=1e-12)
    assert paired_interval(scores, baseline, prompts, seed=2).low != first.low


def test_lists_that_do_not_pair_are_named():
    with refused("3 scores", "2 baselines", "3 prompts"):
        paired_interval([1.0, 2.0, 3.0], [1.0, 2.0], ["a", "b", "c"])
    with refused("2 scores", "2 baselines", "1 prompts"):
        paired_interval([1.0, 2.0], [1.0, 2.0], ["a"])


def test_fewer_than_two_prompts_are_refused():
    for count in (0, 1, 5):
        with refused("two prompts"):
            paired_interval([1.0] * count, [0.0] * count, ["a"] * count)


def test_means_of_draws_are_those_of_the_prompts_drawn():
    """Prompt a has 1 and 3, b has 5 and an image that was not measured: 3, and b alone, 5, where a is not drawn."""
    prompts, values = ["a", "a", "b", "b"], np.array([1.0, 3.0, 5.0, np.nan])
    resamples = resample_prompts(prompts, draws=100)
    means = resampled_means(values, resamples)
    assert means[0] == 3
    expected = {(1, 1): 3, (2, 0): 2, (0, 2): 5}
    for counts, mean in zip(resamples.counts, means, strict=True):
        assert mean == expected[tuple(counts)]


def test_draws_of_prompts_give_the_interval_of_scipys_bootstrap():
    scores, baseline, prompts = simulated(0, prompts=60)
    means = (scores - baseline).reshape(60, IMAGES).mean(1)
    expected = bootstrap((means,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1))
    found = percentile_interval(resampled_means(scores - baseline, resample_prompts(prompts, draws=20_000)))
    assert found.mean == pytest.approx(means.mean())
    tolerance = 0.03 * width(found)  # of a percentile of 20 000 draws
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=tolerance)


def test_values_of_one_prompt_have_a_mean_and_no_interval():
    means = resampled_means(np.array([[2.0, np.nan], [np.nan, np.nan]]), resample_prompts(["a", "b"], draws=10))
    one, none = map(percentile_interval, means)
    assert (one.mean, np.isnan(one.low), np.isnan(one.high)) == (2, True, True)
    assert np.isnan(none.mean)


def test_one_seed_draws_the_same_prompts_whatever_is_computed_from_them():
    first, second = (resample_prompts(["a", "b", "c"], draws=20, seed=3) for _ in range(2))
    assert (first.counts == second.counts).all()
    assert (first.counts.sum(1) == 3).all()
    with refused("two prompts"):
        resample_prompts(["a", "a"], draws=20)


def test_the_deviation_within_prompts_leaves_out_what_lies_between_them():
    """Of 1, 3 the sample variance is 2, of 100, 104, 108 it is 16: σ² = (2 + 16) / 2. One value alone has none."""
    values = [1, 100, 3, 104, 108, 7, float("nan"), 9]
    assert deviation_within(values, ["a", "b", "a", "b", "b", "c", "d", "d"]) == pytest.approx(3)
    assert np.isnan(deviation_within([1.0, 2.0], ["a", "b"]))
