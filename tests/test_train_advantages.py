"""From rewards to advantages and pairs, against numpy and by hand."""

from collections import defaultdict, deque

import numpy as np
import pytest
import torch

from stepfuse.train.advantages import best_and_worst, decoupled_advantages, group_advantages, tracked_advantages
from stepfuse.train.algorithms import DDPO
from stepfuse.train.rollout import SampledStep, Trajectory
from stepfuse.train.settings import DDPOSettings

REWARDS = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
PROMPTS = ["a cat", "a red apple", "two keys"] * 8
GROUPS = torch.tensor([4, 1, 9] * 8)  # names need not be 0 to n - 1, nor lie together


def z_scores(rewards, groups, *, scale=True):
    rewards, groups = rewards.numpy(), groups.numpy()
    scores = np.empty_like(rewards)
    for group in set(groups.tolist()):
        own = rewards[groups == group]
        scores[groups == group] = (own - own.mean()) / (own.std() if scale else 1)
    return scores


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_the_z_scores_of_each_group(scale):
    advantages = group_advantages(REWARDS, GROUPS, scale=scale, clip=100.0)
    np.testing.assert_allclose(advantages.numpy(), z_scores(REWARDS, GROUPS, scale=scale), rtol=1e-6)


def test_equal_rewards_have_no_advantage():
    rewards = torch.full((6,), 0.25)
    assert group_advantages(rewards, torch.arange(6) // 3, scale=True, clip=5.0).tolist() == [0.0] * 6


@pytest.mark.parametrize("reward", [0.1, 2.654323, 14.887697])
@pytest.mark.parametrize("count", [3, 6, 8, 21])
def test_equal_rewards_have_no_advantage_where_their_mean_rounds(reward, count):
    # In float32 the sum of 8 times 14.887697, divided by 8, is not that number again: the deviation
    # is the rounding error then, and must not be divided by.
    rewards = torch.full((count,), reward)
    advantages = group_advantages(rewards, torch.zeros(count, dtype=torch.long), scale=True, clip=5.0)
    assert advantages.abs().max().item() == 0


def test_a_group_of_one_has_no_advantage():
    assert group_advantages(torch.tensor([3.0, -8.0]), torch.tensor([0, 1]), scale=True, clip=5.0).tolist() == [0, 0]


def test_advantages_are_clipped_on_both_sides():
    # one of 101 values at distance 1 from the rest: z = ±10 (mean 1/101, deviation 10/101), the rest ∓0.1
    rewards = torch.zeros(202, dtype=torch.float64)
    rewards[0], rewards[101] = 1, -1
    groups = torch.arange(202) // 101
    free = group_advantages(rewards, groups, scale=True, clip=100.0)
    clipped = group_advantages(rewards, groups, scale=True, clip=5.0)
    assert (free[0].item(), free[101].item()) == (pytest.approx(10), pytest.approx(-10))
    assert (clipped[0].item(), clipped[101].item()) == (5.0, -5.0)
    assert clipped[1].item() == pytest.approx(-0.1)


def test_shifting_and_scaling_rewards_leaves_advantages_alone():
    plain = group_advantages(REWARDS, GROUPS, scale=True, clip=5.0)
    moved = group_advantages(1000 + 20 * REWARDS, GROUPS, scale=True, clip=5.0)
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_prompt", [True, False])
def test_ddpo_assigns_each_micro_batch_advantages_by_the_statistics_of_the_whole_step(per_prompt):
    settings = DDPOSettings(num_generations=4, per_prompt_stat_tracking=per_prompt)
    x = torch.zeros(2, 1, 1, 1)
    step = SampledStep(
        index=0, x_t=x, t=1, s=-1, weights=torch.ones(2, 1), negative=None, reference=x, x_s=x, log_prob=torch.zeros(2)
    )
    trajectory = Trajectory(steps=(step, step), latents=x, conditioning=None)
    rewards, groups = REWARDS[:8], torch.arange(8) // 4
    halves = torch.stack([0.25 * rewards, 0.75 * rewards], 1)  # terms of a weighted reward: advantages are of their sum
    advantages = DDPO(settings).advantages(halves, torch.ones(8, 2), groups, PROMPTS[:8], {})
    assigned = DDPO(settings).assign_advantages(trajectory, advantages[2:4])
    expected = z_scores(rewards, groups if per_prompt else torch.zeros(8))[2:4]
    for step in assigned.steps:
        np.testing.assert_allclose(step.advantage.numpy(), expected, rtol=1e-6)


def gdpo_by_hand(terms, weights, groups):
    """GDPO (arXiv:2601.05242): z-scores of each reward in its group, weighted and summed, then z-scores of that."""
    total = sum(w * z_scores(column, groups) for w, column in zip(weights, terms.unbind(1), strict=True))
    return (total - total.mean()) / total.std()


def test_decoupled_advantages_are_those_of_gdpo_worked_with_numpy():
    terms = torch.stack([REWARDS, 0.01 * torch.sin(9 * REWARDS), 3 - REWARDS**2], 1)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = decoupled_advantages(terms, weights, GROUPS, scale=True, clip=100.0)
    np.testing.assert_allclose(found.numpy(), gdpo_by_hand(terms, weights.tolist(), GROUPS), atol=1e-5)
    # What each term is measured in does not count.
    other = decoupled_advantages(terms * torch.tensor([7.0, 1e3, 0.1]), weights, GROUPS, scale=True, clip=100.0)
    torch.testing.assert_close(other, found, rtol=1e-5, atol=1e-6)


def test_decoupled_advantages_tell_apart_what_the_sum_does_not():
    # GDPO's own example, two goals that are met or not: where both differ within a group, sums are 0 and 2, and
    # plain advantages are those of a group where one goal differs; decoupled, they are twice those.
    terms = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    groups, weights = torch.tensor([0, 0, 1, 1]), torch.ones(2)
    plain = group_advantages(terms.sum(1), groups, scale=True, clip=5.0)
    apart = decoupled_advantages(terms, weights, groups, scale=False, clip=5.0)
    assert plain.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-6)
    assert apart.tolist() == pytest.approx([-2, 2, -1, 1], abs=1e-6)


def test_ddpo_takes_decoupled_advantages_of_a_weighted_reward_where_asked():
    settings = DDPOSettings(
        num_generations=4, reward="weighted:1*a + 3*b", multi_objective_aggregation="normalize_then_sum"
    )
    x = torch.zeros(2, 1, 1, 1)
    step = SampledStep(
        index=0, x_t=x, t=1, s=-1, weights=torch.ones(2, 1), negative=None, reference=x, x_s=x, log_prob=torch.zeros(2)
    )
    trajectory = Trajectory(steps=(step,), latents=x, conditioning=None)
    terms, groups = torch.stack([REWARDS[:8], torch.cos(REWARDS[:8])], 1), torch.arange(8) // 4
    advantages = DDPO(settings).advantages(terms, torch.tensor([0.25, 0.75]).expand(8, 2), groups, PROMPTS[:8], {})
    assigned = DDPO(settings).assign_advantages(trajectory, advantages[2:4])
    expected = gdpo_by_hand(terms, [0.25, 0.75], groups)[2:4]
    np.testing.assert_allclose(assigned.steps[0].advantage.numpy(), expected, rtol=1e-5)


# Statistics over the steps, as ddpo-pytorch and trl 0.23.1 track them

TRACKED = dict(scale=True, clip=5.0)


def test_tracked_advantages_worked_by_hand():
    """Steps of four images, buffer 3, min_count 3.

    Step 1: two rewards per prompt are too few: mean 3 and deviation sqrt(3.5) of 1, 3, 2, 6 for all.
    Step 2: the buffer of `a` is 1, 3, 5 (mean 3, deviation sqrt(8/3)); that of `b` 6, 1, 2 of 2, 6, 1, 2 (mean 3,
    deviation sqrt(14/3)); `c` is new: mean 3 and deviation sqrt(2.5) of 5, 1, 2, 4.
    """
    history = {}
    options = dict(buffer_size=3, min_count=3) | TRACKED
    first = tracked_advantages(torch.tensor([1.0, 3.0, 2.0, 6.0]), ["a", "a", "b", "b"], history, **options)
    assert first.tolist() == pytest.approx([(r - 3) / (3.5**0.5 + 1e-6) for r in (1, 3, 2, 6)], rel=1e-6)
    assert history == {"a": [1, 3], "b": [2, 6]}
    second = tracked_advantages(torch.tensor([5.0, 1.0, 2.0, 4.0]), ["a", "b", "b", "c"], history, **options)
    deviation_a, deviation_b = (8 / 3) ** 0.5 + 1e-6, (14 / 3) ** 0.5 + 1e-6
    expected = [2 / deviation_a, -2 / deviation_b, -1 / deviation_b, (4 - 3) / (2.5**0.5 + 1e-6)]
    assert second.tolist() == pytest.approx(expected, rel=1e-6)
    assert history == {"a": [1, 3, 5], "b": [6, 1, 2], "c": [4]}


@pytest.mark.parametrize(("buffer_size", "min_count"), [(16, 16), (5, 0), (3, 2), (1, 1)])
def test_tracked_advantages_are_those_of_a_tracker_in_numpy(buffer_size, min_count):
    # What PerPromptStatTracker does: a deque of bounded length for every prompt, and numpy's mean and deviation.
    generator = np.random.default_rng(3)
    buffers = defaultdict(lambda: deque(maxlen=buffer_size))
    history = {}
    for _ in range(12):
        prompts = generator.choice(["a", "b", "c", "d"], size=10)
        rewards = generator.normal(5, 2, size=10)
        expected = np.empty(10)
        for prompt in np.unique(prompts):
            buffers[prompt].extend(rewards[prompts == prompt])
            known = rewards if len(buffers[prompt]) < min_count else buffers[prompt]
            expected[prompts == prompt] = (rewards[prompts == prompt] - np.mean(known)) / (np.std(known) + 1e-6)
        found = tracked_advantages(
            torch.tensor(rewards), prompts.tolist(), history, buffer_size=buffer_size, min_count=min_count, **TRACKED
        )
        np.testing.assert_allclose(found.numpy(), expected.clip(-5, 5), rtol=1e-9, atol=1e-9)
    assert {prompt: list(values) for prompt, values in buffers.items()} == history


def test_tracked_advantages_without_scale_are_differences_and_clipped():
    history = {"a": [0.0, 2.0]}
    found = tracked_advantages(
        torch.tensor([4.0, 30.0]), ["a", "b"], history, buffer_size=9, min_count=2, scale=False, clip=5.0
    )
    assert found.tolist() == [2.0, 5.0]  # 4 - mean(0, 2, 4), and 30 - mean(4, 30) = 13


def test_ddpo_remembers_rewards_where_asked_and_only_finite_ones():
    settings = DDPOSettings(
        num_generations=2, per_prompt_stat_tracking_buffer_size=4, per_prompt_stat_tracking_min_count=3
    )
    history = {}
    rewards, groups = torch.tensor([[1.0], [2.0], [float("nan")], [5.0]]), torch.tensor([0, 0, 1, 1])
    advantages = DDPO(settings).advantages(rewards, torch.ones(4, 1), groups, ["a", "a", "b", "b"], history)
    assert history == {"a": [1, 2], "b": [5]}
    deviation = ((25 + 4 + 49) / 27) ** 0.5  # of 1, 2, 5 about 8/3
    expected = [(value - 8 / 3) / deviation if value else 0 for value in (1, 2, 0, 5)]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-5)
    DDPO(DDPOSettings(num_generations=2)).advantages(rewards, torch.ones(4, 1), groups, ["a", "a", "b", "b"], history)
    assert history == {"a": [1, 2], "b": [5]}  # not tracked


@pytest.mark.parametrize(
    "wrong",
    [
        dict(per_prompt_stat_tracking_min_count=2),
        dict(per_prompt_stat_tracking_buffer_size=-1),
        dict(per_prompt_stat_tracking_buffer_size=4, per_prompt_stat_tracking_min_count=5),
        dict(per_prompt_stat_tracking_buffer_size=4, per_prompt_stat_tracking=False),
        dict(
            per_prompt_stat_tracking_buffer_size=4,
            multi_objective_aggregation="normalize_then_sum",
            reward="weighted:1*a + 1*b",
        ),
    ],
)
def test_tracking_that_does_not_fit_together_is_refused(wrong):
    with pytest.raises(ValueError, match="per_prompt_stat_tracking_"):
        DDPOSettings(**wrong)


def test_one_image_per_prompt_is_enough_where_earlier_ones_are_remembered():
    with pytest.raises(ValueError, match="num_generations is 1"):
        DDPOSettings(num_generations=1)
    assert DDPOSettings(num_generations=1, per_prompt_stat_tracking_buffer_size=16).num_generations == 1


def test_best_and_worst_drop_ties_and_honour_the_margin():
    rewards = torch.tensor(
        [
            [1.0, 3.0, 2.0, 0.0],  # 3 apart
            [5.0, 5.0, 5.0, 5.0],  # a tie
            [0.0, 0.25, 0.5, 0.25],  # 0.5 apart
            [-1.0, -9.0, -1.0, -2.0],  # 8 apart
        ]
    )
    winner, loser, kept = best_and_worst(rewards, 0.0)
    assert winner.tolist()[0::2] == [1, 2]
    assert loser.tolist()[0::2] == [3, 0]
    assert rewards[3, winner[3]].item() == -1
    assert loser[3].item() == 1
    assert kept.tolist() == [True, False, True, True]
    assert best_and_worst(rewards, 0.5)[2].tolist() == [True, False, False, True]  # more than the margin, not as much
    assert best_and_worst(rewards, 0.49)[2].tolist() == [True, False, True, True]
