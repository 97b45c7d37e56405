"""Both losses find p* ∝ p_ref exp(Q / β), the optimum of E[Q] - β KL(p ‖ p_ref), in a world where it is known.

One denoising step in four dimensions, from one x_t. The reward of where it leads is quadratic,
Q(x) = -k |x - c|² / 2, so p* is Gaussian:

    1/v* = 1/v + k/β,        m* = v* (m_ref / v + k c / β)

or linear, Q(x) = g · x, and then v* = v and m* = m_ref + v g / β.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, step_variance
from stepfuse.train.advantages import group_advantages
from stepfuse.train.losses import ddpo_loss, dpo_loss

T, S, ETA, BETA = 700, 500, 0.9, 0.5
PATH = NoisePath.from_scheduler(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
)
X_T = torch.tensor([[0.3, -1.2, 0.8, 0.1]])
PREDICTION = torch.tensor([[0.5, -0.9, 0.2, -0.4]])  # of the reference
DIRECTION = torch.tensor([0.5, -0.5, 0.5, 0.5])  # of length 1
REFERENCE = transition(PATH, X_T, PREDICTION, T, S, step_variance(EtaSchedule(eta=ETA), PATH, T, S, X_T))
V = REFERENCE.variance.item()


class Policy:
    """A learnable shift of the prediction, and variance offsets where the schedule is learned."""

    def __init__(self, *, learned):
        self.shift = torch.zeros(4, requires_grad=True)
        self.offsets = torch.zeros(3, requires_grad=True) if learned else None

    def gaussian(self):
        schedule = EtaSchedule(eta=ETA) if self.offsets is None else LearnedSchedule(offsets=self.offsets, eta=ETA)
        return transition(PATH, X_T, PREDICTION + self.shift, T, S, step_variance(schedule, PATH, T, S, X_T))

    def fit(self, loss, *, steps, rate):
        """Adam with a rate that falls to nothing along a cosine."""
        optimizer = torch.optim.Adam([p for p in (self.shift, self.offsets) if p is not None], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(self.gaussian(), generator).mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return self.gaussian()


def draw(gaussian, count, generator):
    noise = torch.randn(count, 4, generator=generator)
    return (gaussian.mean + gaussian.variance.sqrt() * noise).detach()


def wide(gaussian, count):
    """One Gaussian as a batch."""
    return type(gaussian)(mean=gaussian.mean.expand(count, 4), variance=gaussian.variance.expand(count, 1))


def quadratic(strength, distance):
    """Q with k = strength · β / v, peaked `distance` standard deviations off; its v* and m*."""
    k = strength * BETA / V
    c = REFERENCE.mean + distance * math.sqrt(V) * DIRECTION
    variance = 1 / (1 / V + k / BETA)
    return (lambda x: -k * (x - c).square().sum(1) / 2), variance, variance * (REFERENCE.mean / V + k * c / BETA)


def linear(distance):
    """Q that moves the mean by `distance` standard deviations."""
    g = distance * BETA / math.sqrt(V) * DIRECTION
    return (lambda x: x @ g), V, REFERENCE.mean + V * g / BETA


def dpo(reward, *, from_policy, count=4096):
    """Pairs from the reference or the policy, labelled by P(a ≻ b) = σ(Q(a) - Q(b))."""

    def loss(policy, generator):
        a, b = (draw(policy if from_policy else REFERENCE, count, generator) for _ in range(2))
        prefers_a = torch.rand(count, generator=generator) < torch.sigmoid(reward(a) - reward(b))
        chosen, rejected = (torch.where(wins[:, None], a, b) for wins in (prefers_a, ~prefers_a))
        ours, theirs = wide(policy, count), wide(REFERENCE, count)
        return dpo_loss(
            ours.log_prob(chosen),
            ours.log_prob(rejected),
            theirs.log_prob(chosen),
            theirs.log_prob(rejected),
            beta=BETA,
        )

    return loss


def ddpo(reward, *, count=4096):
    """On-policy draws, advantages that are rewards less their mean, and β times the exact KL."""

    def loss(policy, generator):
        x = draw(policy, count, generator)
        advantage = group_advantages(reward(x), torch.zeros(count, dtype=torch.long), scale=False, clip=math.inf)
        ours = wide(policy, count)
        log_prob = ours.log_prob(x)
        return ddpo_loss(log_prob, log_prob.detach(), advantage, clip_range=0.2) + BETA * policy.kl(REFERENCE)

    return loss


def assert_is(found, variance, mean):
    errors = {
        "variance": abs(found.variance.item() / variance - 1),
        "mean": ((found.mean - mean).norm() / (REFERENCE.mean - mean).norm()).item(),
    }
    assert max(errors.values()) < 0.05, errors


QUADRATIC = [(1.0, 2.0), (3.0, 1.5), (-0.3, 3.0)]  # v* is a half, a quarter, and ten sevenths of v
LOSSES = {
    "dpo, pairs of the reference": lambda reward: dpo(reward, from_policy=False),
    "dpo, pairs of the policy": lambda reward: dpo(reward, from_policy=True),
    "ddpo": ddpo,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("strength", "distance"), QUADRATIC)
def test_mean_and_learned_variance_reach_the_optimum_of_a_quadratic_reward(loss, strength, distance):
    reward, variance, mean = quadratic(strength, distance)
    assert variance < PATH.at(S, X_T)[1].item() ** 2  # no path allows more
    assert_is(Policy(learned=True).fit(LOSSES[loss](reward), steps=200, rate=0.05), variance, mean)


@pytest.mark.parametrize("loss", LOSSES)
def test_mean_reaches_the_optimum_of_a_linear_reward_under_a_fixed_schedule(loss):
    reward, variance, mean = linear(1.5)
    found = Policy(learned=False).fit(LOSSES[loss](reward), steps=200, rate=0.05)
    assert_is(found, variance, mean)


@pytest.mark.parametrize("loss", LOSSES)
def test_learned_variance_stays_where_a_linear_reward_wants_it(loss):
    reward, variance, mean = linear(1.5)
    assert_is(Policy(learned=True).fit(LOSSES[loss](reward), steps=200, rate=0.05), variance, mean)


def test_ddpo_under_a_fixed_schedule_finds_the_best_mean():
    # with v fixed, d/dm (-k |m - c|²/2 - β |m - m_ref|²/(2v)) = 0 at the same m* as with v* free
    reward, _, mean = quadratic(1.0, 2.0)
    assert_is(Policy(learned=False).fit(ddpo(reward), steps=200, rate=0.05), V, mean)


def test_dpo_without_a_difference_in_reward_stays_at_the_reference():
    found = Policy(learned=True).fit(dpo(lambda x: torch.zeros(len(x)), from_policy=False), steps=200, rate=0.05)
    assert abs(found.variance.item() / V - 1) < 0.05
    assert (found.mean - REFERENCE.mean).norm().item() < 0.05 * math.sqrt(V)
