"""The weights that a joint run trains on: vertices in turn, and a Dirichlet distribution between them."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Dirichlet

from stepfuse.train.loop import train_adapter
from stepfuse.train.mixtures import group_weights
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_training import Watched, forget_accelerator, two_epochs

REWARDS = """
def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))

def flat(images, prompts):
    return -images.std((1, 2, 3))
"""
OBJECTIVES = [dict(reward=name) for name in "abc"]


def settings(**own):
    return DPOSettings(**dict(objectives=OBJECTIVES) | own)


def drawn(rollouts, groups, **own):
    return torch.cat([group_weights(settings(**own), rollout, groups) for rollout in range(rollouts)])


def vertices(weights):
    """The objective of each row that has all weight on one."""
    return weights[(weights == 1).any(1)].argmax(1)


def test_weights_sum_to_1_and_one_objective_has_all():
    weights = drawn(20, 4)
    assert weights.shape == (80, 3)
    assert weights.dtype == torch.float64
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(80, dtype=torch.float64))
    assert group_weights(DPOSettings(), 3, 5).tolist() == [[1.0]] * 5


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("groups", [1, 4, 5])
def test_the_share_of_vertices_is_exact_and_each_has_its_turn(share, groups):
    """Of the first n groups floor(n · share) are vertices, of the objectives one after the other."""
    weights = drawn(30, groups, vertex_share=share)
    at = (weights == 1).any(1)
    counts = at.cumsum(0)
    assert counts.tolist() == [math.floor((n + 1) * share) for n in range(len(weights))]
    turns = vertices(weights).tolist()
    assert turns == [number % 3 for number in range(len(turns))]


def test_an_objective_with_more_turns_is_a_vertex_as_much_more_often():
    """Of any 7 vertices in a row 4 are the third objective's, 2 the second's and 1 the first's; the mixtures stay."""
    own = [entry | {"vertex_turns": turns} for entry, turns in zip(OBJECTIVES, (1, 2, 4), strict=True)]
    weights, plain = drawn(30, 4, objectives=own), drawn(30, 4)
    turns = vertices(weights).tolist()
    assert len(turns) == 60
    for start in range(len(turns) - 7):
        assert [turns[start : start + 7].count(i) for i in range(3)] == [1, 2, 4]
    assert turns[:7] == [2, 1, 2, 2, 0, 1, 2]  # by (had + 1) / turns, of equal ones the first
    mixed = (plain != 1).all(1)
    assert torch.equal(weights[mixed], plain[mixed])


@pytest.mark.parametrize("concentration", [0.5, 1.0, 4.0])
def test_the_others_have_the_moments_of_a_dirichlet_distribution(concentration):
    """Mean 1/3, variance 2/9 / (3 α + 1), covariance -1/9 / (3 α + 1); and the law of one weight, Beta(α, 2 α)."""
    count = 3000
    weights = drawn(1, count, vertex_share=0, weight_concentration=concentration)
    expected = Dirichlet(torch.full((3,), concentration, dtype=torch.float64))
    deviation = expected.variance.sqrt() / count**0.5
    assert ((weights.mean(0) - expected.mean) / deviation).abs().max() < 4
    covariance = torch.cov(weights.T)
    torch.testing.assert_close(covariance.diagonal(), expected.variance, rtol=0.12, atol=0)
    off = covariance[~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, -1 / 9 / (3 * concentration + 1)), rtol=0.2, atol=0)
    below = [(weights[:, 0] < x).double().mean().item() for x in (0.1, 0.3, 0.6)]
    exact = [regularised_beta(concentration, 2 * concentration, x) for x in (0.1, 0.3, 0.6)]
    assert below == pytest.approx(exact, abs=4 * 0.5 / count**0.5)


def regularised_beta(a, b, x):
    """P(w < x) of Beta(a, b), by quadrature after w = u^(1/a), which leaves no pole at 0."""
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * x**a
    scale = torch.exp(torch.lgamma(torch.tensor(a + b)) - torch.lgamma(torch.tensor(a)) - torch.lgamma(torch.tensor(b)))
    return float(scale * ((1 - u ** (1 / a)) ** (b - 1)).mean() * x**a / a)


def test_a_concentration_near_0_leaves_weights_that_are_numbers():
    weights = drawn(1, 500, vertex_share=0, weight_concentration=0.01)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones(500, dtype=torch.float64))
    assert (weights.amax(1) > 0.99).double().mean() > 0.8


def test_weights_depend_on_seed_rollout_and_group_alone():
    """So a run that is resumed, and every process, has the same: torch's own generator has no part in them."""
    torch.manual_seed(1)
    first = group_weights(settings(vertex_share=0), 7, 4)
    torch.manual_seed(2)
    assert torch.equal(group_weights(settings(vertex_share=0), 7, 4), first)
    assert len({tuple(row) for row in first.tolist()}) == 4
    for seed, rollout in ((0, 8), (1, 7)):
        other = group_weights(settings(vertex_share=0, seed=seed), rollout, 4)
        assert not (other == first).any()
    ddpo = DDPOSettings(objectives=OBJECTIVES, vertex_share=0)
    assert torch.equal(group_weights(replace(ddpo, train_batch_size=2), 7, 4), first)


# In a run


class WatchedWeights(Watched):
    """And the weights of each rollout."""

    def __init__(self, settings):
        super().__init__(settings)
        self.drawn = []

    def collect(self, sampling, conditioning, generators, weights, score):
        self.drawn.append(weights.tolist())
        return super().collect(sampling, conditioning, generators, weights, score)


@pytest.mark.parametrize("rule", ["soup", "product"])
def test_every_rollout_has_its_weights_and_its_first_update_starts_from_a_ratio_of_exactly_1(
    run_training, tiny_base, rule
):
    """With two updates a rollout every vertex has its turn all the same."""
    own = dict(guidance="off", train_rule=rule, train_batch_size=2, max_train_steps=8, variance="learned")
    settings = two_epochs(
        tiny_base, objectives=[dict(reward=f"rewards.py:{name}") for name in ("slope", "flat")], **own
    )
    watched = WatchedWeights(settings)
    forget_accelerator()
    train_adapter(settings, watched)
    mixed, slope, again, calm = (batch[0] for batch in watched.drawn)
    assert all(batch[0] == batch[1] for batch in watched.drawn)  # a group has one
    assert (slope, calm) == ([1, 0], [0, 1])
    assert 0 < mixed[0] < 1
    assert 0 < again[0] < 1
    assert mixed != again
    updates = [watched.ratios[i : i + 3] for i in range(0, 24, 3)]  # three denoising steps each
    assert all(update == [[0.0] * 2] * 3 for update in updates[::2])
    assert min(max(abs(ratio) for step in update for ratio in step) for update in updates[1::2]) > 1e-5
