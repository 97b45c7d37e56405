"""Joint training reaches the optimum of every mixture, in a world where it is known.

One denoising step in four dimensions, from one x_t, and three objectives. Policy i is the step's Gaussian under a shift
of the prediction and a variance schedule of its own, and both are trained; the package's rules fuse the policies. The
rewards of where the step leads are quadratic, r_i(x) = -k_i |x - c_i|² / 2. The optimum of a mixture, which is
p* ∝ p_ref exp(Σ w_i r_i / β) with p_ref ∝ Π p_ref,i^(w_i), is then a Gaussian:

    1/v* = Σ w_i (1/v_i + k_i/β),        m* = v* Σ w_i (m_i/v_i + k_i c_i/β)

Or they are linear under one schedule, r_i(x) = g_i · x, each divided by its deviation in the group, |g_i| sqrt(v), as
the advantages of a training are:

    v* = v,        m* = m_ref + sqrt(v)/β Σ w_i g_i/|g_i|

The joint run takes N steps on the losses of the fused policy, at the weights that a training draws. The separate runs
have as many images together: each takes N/3 steps on its own reward, with as many images a step, and stops before it
has arrived. What holds them up is the learning rate: a step of Adam moves no number further. Their fusion is then about
as far from the optimum of each mixture as they are from theirs; and a step of the joint run moves all three, for the
fused density depends on each. With N steps each, so three times the images, the separate runs arrive as well.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, step_variance
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.train.advantages import group_advantages, mixed_advantages
from stepfuse.train.fused_sampling import fusion_step
from stepfuse.train.losses import ddpo_loss, dpo_loss
from stepfuse.train.mixtures import group_weights
from stepfuse.train.settings import DDPOSettings
from tests.fixtures_training import BETAS

T, S, BETA = 700, 500, 0.4
N, RATE, GROUPS, IMAGES = 93, 0.05, 8, 600
PATH = NoisePath.from_scheduler(DDIMScheduler(**BETAS, clip_sample=False))
X_T = torch.tensor([[0.3, -1.2, 0.8, 0.1]])
PREDICTION = torch.tensor([[0.5, -0.9, 0.2, -0.4]])  # of the base
DIRECTIONS = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, -1.0]]) / 2
SETTINGS = DDPOSettings(objectives=[dict(reward=name) for name in "abc"])
GROUP = torch.arange(GROUPS).repeat_interleave(IMAGES)
VERTICES = torch.eye(3, dtype=torch.float64)
MIXTURES = torch.cat(
    [
        VERTICES,
        torch.tensor([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.25, 0.75, 0], [0.6, 0.1, 0.3]]).double(),
        torch.full((1, 3), 1 / 3, dtype=torch.float64),
    ]
)


class Quadratic:
    """Rewards that narrow the policies and are peaked off the base's means, on schedules with etas of their own."""

    etas, learned = (0.9, 0.6, 0.8), True

    def __init__(self):
        means, v = reference(self.etas)
        self.k = torch.tensor([1.4, 0.7, 1.8]) * BETA / v
        self.c = means + (torch.tensor([2.5, 3.5, 2.0]) * v.sqrt())[:, None] * DIRECTIONS

    def rewards(self, x):
        return torch.stack([-k * (x - c).square().sum(1) / 2 for k, c in zip(self.k, self.c, strict=True)], 1)

    def advantages(self, x, weights):
        total = (self.rewards(x) * weights).sum(1)
        return group_advantages(total, GROUP, scale=False, clip=math.inf)

    def optimum(self, w):
        means, v = reference(self.etas)
        variance = 1 / (w * (1 / v + self.k / BETA)).sum()
        return variance * (w[:, None] * (means / v[:, None] + self.k[:, None] * self.c / BETA)).sum(0), variance


class Linear:
    """Rewards in units of their own, under one schedule."""

    etas, learned, units = (0.8, 0.8, 0.8), False, (1.0, 40.0, 0.01)

    def advantages(self, x, weights):
        rewards = x @ DIRECTIONS.T * torch.tensor(self.units)
        return mixed_advantages(rewards, weights, GROUP, scale=False, clip=math.inf)

    def optimum(self, w):
        means, v = reference(self.etas)
        return means[0] + v[0].sqrt() / BETA * (w @ DIRECTIONS), v[0]


def reference(etas):
    """Means and variances of the base under each schedule."""
    schedules = [EtaSchedule(eta=eta) for eta in etas]
    steps = [transition(PATH, X_T, PREDICTION, T, S, step_variance(each, PATH, T, S, X_T)) for each in schedules]
    return torch.cat([step.mean for step in steps]), torch.cat([step.variance.flatten() for step in steps])


class Policies:
    """Three policies, and what a rule makes of them."""

    def __init__(self, world, rule):
        self.rule, self.etas = get_rule(rule), world.etas
        self.shifts = torch.zeros(3, 4, requires_grad=True)
        self.offsets = torch.zeros(3, 3, requires_grad=world.learned)

    def fused(self, weights, *, trained=True):
        """p(x_s | x_t) at each row of weights, or before training."""
        known = zip(self.offsets, self.etas, strict=True)
        schedules = [LearnedSchedule(offsets=o, eta=eta) if trained else EtaSchedule(eta=eta) for o, eta in known]
        plan = Plan(
            path=PATH,
            steps=[(T, S)],
            objectives=[Expert.adapter(name, schedule) for name, schedule in zip("abc", schedules, strict=True)],
            base=Expert.base(schedules[0].base),
            weights=weights.T[None],
            strength=1.0,
        )
        step = fusion_step(plan, 0, X_T.expand(len(weights), 4))
        predictions = []
        for network, rows in self.rule.networks(step):
            w = torch.tensor([dict(network.weights).get(name, 0.0) for name in "abc"])
            prediction = PREDICTION + w @ self.shifts if trained else PREDICTION
            predictions.append(step.spread(prediction.expand(len(rows), 4), step.some_rows(rows)))
        return self.rule.combine(step, predictions)

    def fit(self, loss, weights_of, steps):
        """Adam with a rate that would fall to nothing along a cosine in N steps."""
        optimizer = torch.optim.Adam([p for p in (self.shifts, self.offsets) if p.requires_grad], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N)
        generator = torch.Generator().manual_seed(0)
        for number in range(steps):
            weights = weights_of(number)
            optimizer.zero_grad()
            loss(self.fused(weights), self.fused(weights, trained=False), weights, generator).backward()
            optimizer.step()
            schedule.step()
        return self

    @torch.no_grad()
    def errors(self, world):
        """By mixture, the larger one of the errors of mean, in units of its distance to the base, and variance."""
        found, base, errors = self.fused(MIXTURES), self.fused(MIXTURES, trained=False), []
        for i, w in enumerate(MIXTURES.float()):
            mean, variance = world.optimum(w)
            off = (found.mean[i] - mean).norm() / (base.mean[i] - mean).norm()
            errors.append(max(off.item(), abs(found.variance.expand(len(MIXTURES), 1)[i].item() / variance.item() - 1)))
        return errors


def wide(gaussian):
    """As many copies of each group's Gaussian as it has images."""
    variance = gaussian.variance.expand(GROUPS, 1)
    return Gaussian(mean=gaussian.mean[GROUP], variance=variance[GROUP])


def draw(gaussian, generator):
    return (gaussian.mean + gaussian.variance.sqrt() * torch.randn(len(GROUP), 4, generator=generator)).detach()


def ddpo(world):
    def loss(policy, base, weights, generator):
        ours = wide(policy)
        x = draw(ours, generator)
        log_prob, advantages = ours.log_prob(x), world.advantages(x, weights[GROUP].float())
        return ddpo_loss(log_prob, log_prob.detach(), advantages, clip_range=0.2).mean() + BETA * policy.kl(base).mean()

    return loss


def dpo(world):
    """Pairs of the policy, labelled by P(a ≻ b) = σ(Σ w_i (r_i(a) - r_i(b)))."""

    def loss(policy, base, weights, generator):
        ours, theirs = wide(policy), wide(base)
        a, b = (draw(ours, generator) for _ in range(2))
        gap = ((world.rewards(a) - world.rewards(b)) * weights[GROUP]).sum(1)
        prefers_a = torch.rand(len(GROUP), generator=generator) < torch.sigmoid(gap)
        pair = [torch.where(wins[:, None], a, b) for wins in (prefers_a, ~prefers_a)]
        return dpo_loss(*(p.log_prob(x) for p in (ours, theirs) for x in pair), beta=BETA).mean()

    return loss


def joint(world, rule, loss):
    return Policies(world, rule).fit(loss(world), lambda rollout: group_weights(SETTINGS, rollout, GROUPS), N)


def separate(world, rule, loss, steps):
    """Each policy of a run of its own, which has all weight on it."""
    result = Policies(world, rule)
    for i in range(3):
        own = Policies(world, rule).fit(loss(world), lambda _, i=i: VERTICES[i].expand(GROUPS, 3), steps)
        for name in ("shifts", "offsets"):
            getattr(result, name).data[i] = getattr(own, name).data[i]
    return result


@pytest.mark.parametrize(
    ("world", "rule", "loss"),
    [
        (Quadratic(), "product", ddpo),
        (Quadratic(), "product", dpo),
        (Linear(), "product", ddpo),
        (Linear(), "soup", ddpo),
    ],
    ids=["quadratic, ddpo", "quadratic, dpo", "linear, product", "linear, soup"],
)
def test_joint_training_reaches_every_mixture_with_the_images_that_stop_separate_ones_early(world, rule, loss):
    together, apart = joint(world, rule, loss).errors(world), separate(world, rule, loss, N // 3).errors(world)
    assert max(together) < 0.05, together
    assert min(apart) > 0.08, apart


def test_separate_runs_reach_every_mixture_by_their_product_with_three_times_the_images():
    errors = separate(Quadratic(), "product", ddpo, N).errors(Quadratic())
    assert max(errors) < 0.05, errors
