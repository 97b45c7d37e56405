"""Several rewards of a group under weights: advantages and scores, by hand, by numpy and by torch's own `std`."""

import numpy as np
import pytest
import torch

from stepfuse.train.advantages import best_and_worst, group_advantages, mixed_advantages, weighted_scores
from stepfuse.train.algorithms import DDPO
from stepfuse.train.settings import DDPOSettings

OBJECTIVES = [dict(reward="a"), dict(reward="b")]


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Advantages of DDPO


def test_advantages_worked_by_hand():
    """Group 1, weights ½ and ½: a is 0, 2 → z = -1, 1, and b is 30, 10 → z = 1, -1: the sum is 0, 0, and none better.
    Group 2, weights ¾ and ¼: a is 5, 1 → 1, -1, and b is 7, 9 → -1, 1: ½ and -½, of deviation ½: 1, -1.
    Group 3, all on b: a does not count.
    """
    rewards = torch.tensor([[0, 30], [2, 10], [5, 7], [1, 9], [100, 4], [0, 8]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.5]] * 2 + [[0.75, 0.25]] * 2 + [[0.0, 1.0]] * 2)
    groups = torch.tensor([1, 1, 2, 2, 3, 3])
    expected = [0, 0, 1, -1, -1, 1]
    assert mixed_advantages(rewards, weights, groups, scale=True, clip=9.0).tolist() == pytest.approx(expected)
    unscaled = mixed_advantages(rewards, weights, groups, scale=False, clip=9.0)
    assert unscaled.tolist() == pytest.approx([0, 0, 0.5, -0.5, -1, 1])
    clipped = mixed_advantages(rewards, weights, groups, scale=True, clip=0.25)
    assert clipped.tolist() == pytest.approx([value / 4 for value in expected])


def test_advantages_are_z_scores_of_weighted_z_scores_by_numpy():
    rewards, groups = numbers(24, 3) * torch.tensor([1.0, 50.0, 0.01]) + 7, torch.tensor([4, 1, 9] * 8)
    weights = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]] * 8)
    found = mixed_advantages(rewards, weights, groups, scale=True, clip=100.0).numpy()
    for group in (4, 1, 9):
        own = (groups == group).numpy()
        r, w = rewards.numpy()[own], weights.double().numpy()[own]
        total = ((r - r.mean(0)) / r.std(0) * w).sum(1)
        np.testing.assert_allclose(found[own], (total - total.mean()) / total.std(), rtol=1e-5)


def test_at_a_vertex_advantages_are_those_of_that_reward_alone():
    rewards, groups = numbers(24, 2), torch.arange(24) // 4
    weights = torch.tensor([[0.0, 1.0]]).expand(24, 2)
    found = mixed_advantages(rewards, weights, groups, scale=True, clip=1.5)
    torch.testing.assert_close(found, group_advantages(rewards[:, 1], groups, scale=True, clip=1.5), rtol=0, atol=1e-6)


def test_units_of_a_reward_do_not_count_and_a_reward_that_is_equal_in_a_group_does_not_either():
    rewards, groups = numbers(12, 2), torch.arange(12) // 4
    weights = torch.tensor([[0.6, 0.4]]).expand(12, 2)
    found = mixed_advantages(rewards, weights, groups, scale=True, clip=5.0)
    other = mixed_advantages(rewards * torch.tensor([1e3, 0.2]) - 40, weights, groups, scale=True, clip=5.0)
    torch.testing.assert_close(other, found, rtol=0, atol=1e-6)
    rewards[:4, 0] = 0.1  # whose mean, in float32 too, need not be 0.1 again
    for kind in (torch.float64, torch.float32):
        found = mixed_advantages(rewards.to(kind), weights, groups, scale=True, clip=5.0)[:4]
        alone = group_advantages(rewards[:4, 1].to(kind), groups[:4], scale=True, clip=5.0)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_ddpo_leaves_out_an_image_without_one_of_its_rewards():
    settings = DDPOSettings(objectives=OBJECTIVES, num_generations=4)
    rewards = torch.tensor([[1.0, 9.0], [float("nan"), 5.0], [3.0, 7.0], [2.0, float("-inf")], [0.0, 1.0], [4.0, 1.0]])
    weights = torch.tensor([[0.75, 0.25]] * 4 + [[0.5, 0.5]] * 2)
    groups = torch.tensor([0] * 4 + [1] * 2)
    found = DDPO(settings).advantages(rewards, weights, groups, ["a cat"] * 6, {})
    # of group 0 two are left: a 1, 3 → -1, 1 and b 9, 7 → 1, -1: -½, ½; of group 1 a counts alone
    assert found.tolist() == pytest.approx([-1, 0, 1, 0, -1, 1], abs=1e-6)


# Scores of DPO's candidates


def test_scores_worked_by_hand():
    """Of 1, 2, 3: mean 2, deviation √⅔, so z = -√1.5, 0, √1.5; of 8, 2, 2: mean 4, deviation √8: √2, -√½, -√½."""
    rewards = torch.tensor([[[1.0, 8.0], [2.0, 2.0], [3.0, 2.0]]] * 3)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    a, b = (-(1.5**0.5), 0, 1.5**0.5), (2**0.5, -(0.5**0.5), -(0.5**0.5))
    mixed = [x / 4 + 3 * y / 4 for x, y in zip(a, b, strict=True)]
    found = weighted_scores(rewards, weights)
    for row, expected in zip(found.tolist(), (a, b, mixed), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    winner, loser, kept = best_and_worst(found, 0.0)
    assert (winner.tolist(), loser.tolist(), kept.tolist()) == ([2, 0, 0], [0, 1, 1], [True] * 3)


def test_scores_are_weighted_z_scores_by_torchs_own_deviation():
    rewards, weights = numbers(5, 4, 3), numbers(5, 3).softmax(1)
    z = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(
        weighted_scores(rewards, weights), torch.einsum("bco,bo->bc", z, weights), rtol=1e-6, atol=0
    )


def test_the_score_of_one_objective_is_its_reward():
    rewards = numbers(5, 4, 1)
    assert torch.equal(weighted_scores(rewards, torch.ones(5, 1)), rewards[..., 0])


@pytest.mark.parametrize("reward", [0.1, 14.887697])
def test_candidates_with_equal_rewards_make_no_pair_where_their_mean_rounds(reward):
    rewards = torch.full((2, 3, 2), reward)
    rewards[1, :, 1] = torch.tensor([1.0, 2.0, 3.0])
    scores = weighted_scores(rewards, torch.tensor([[0.5, 0.5]] * 2))
    assert scores[0].tolist() == [0, 0, 0]
    assert best_and_worst(scores, 0.0)[2].tolist() == [False, True]  # the other reward tells them apart


def test_rewards_that_cancel_leave_neither_an_advantage_nor_a_pair():
    """Each is a constant less the other: under equal weights what is left is rounding, and no image is better."""
    rewards = torch.rand(64, 4, 1, generator=torch.Generator().manual_seed(1)) * 0.01
    opposed, equal = torch.cat([rewards, 0.3 - 7 * rewards], 2), torch.full((64, 2), 0.5)
    assert not best_and_worst(weighted_scores(opposed, equal), 0.0)[2].any()
    flat, groups = opposed.flatten(0, 1), torch.arange(64).repeat_interleave(4)
    halves = equal.repeat_interleave(4, 0)
    assert mixed_advantages(flat, halves, groups, scale=True, clip=5.0).abs().max() == 0
    other = torch.tensor([0.501, 0.499])  # a preference, however small, is one
    assert best_and_worst(weighted_scores(opposed, other.expand(64, 2)), 0.0)[2].all()
    assert mixed_advantages(flat, other.expand(256, 2), groups, scale=True, clip=5.0).abs().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.0]])
def test_a_candidate_whose_reward_is_not_finite_drops_the_pair(value, weights):
    """Also where that objective has no weight: its reward is at fault, and the others of the batch are as they were."""
    rewards = numbers(2, 3, 2)
    before = weighted_scores(rewards, torch.tensor([weights] * 2))
    rewards[0, 1, 1] = value
    scores = weighted_scores(rewards, torch.tensor([weights] * 2))
    assert best_and_worst(scores, 0.0)[2].tolist() == [False, True]
    assert torch.equal(scores[1], before[1])
