"""From rewards to advantages and pairs, against numpy and by hand."""

import numpy as np
import pytest
import torch

from stepfuse.train.algorithms import DDPO
from stepfuse.train.credit import best_and_worst, decoupled_advantages, group_advantages
from stepfuse.train.rollout import SampledStep, Trajectory
from stepfuse.train.settings import DDPOSettings

REWARDS = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
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
def test_ddpo_credits_each_micro_batch_with_the_statistics_of_the_whole_step(per_prompt):
    settings = DDPOSettings(num_generations=4, per_prompt_stat_tracking=per_prompt)
    x = torch.zeros(2, 1, 1, 1)
    step = SampledStep(x_t=x, t=1, s=-1, negative=None, reference=x, x_s=x, log_prob=torch.zeros(2))
    trajectory = Trajectory(steps=(step, step), latents=x, conditioning=None)
    rewards, groups = REWARDS[:8], torch.arange(8) // 4
    halves = torch.stack([0.25 * rewards, 0.75 * rewards], 1)  # terms of a weighted reward: advantages are of their sum
    credited = DDPO(settings).credit(trajectory, halves, torch.ones(2), groups, slice(2, 4))
    expected = z_scores(rewards, groups if per_prompt else torch.zeros(8))[2:4]
    for step in credited.steps:
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
    step = SampledStep(x_t=x, t=1, s=-1, negative=None, reference=x, x_s=x, log_prob=torch.zeros(2))
    trajectory = Trajectory(steps=(step,), latents=x, conditioning=None)
    terms, groups = torch.stack([REWARDS[:8], torch.cos(REWARDS[:8])], 1), torch.arange(8) // 4
    credited = DDPO(settings).credit(trajectory, terms, torch.tensor([0.25, 0.75]), groups, slice(2, 4))
    expected = gdpo_by_hand(terms, [0.25, 0.75], groups)[2:4]
    np.testing.assert_allclose(credited.steps[0].advantage.numpy(), expected, rtol=1e-5)


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
