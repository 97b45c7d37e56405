"""The joint loss and its gradients against the fused density written out, in float64.

Every network is the base's own forward with the weights W + Σ_i w_i s_i B_i A_i put in place of W, and the step is
DDIM's (arXiv:2010.02502, eq. 12 and 16) on diffusers' table, with

    product:  1/v = Σ w_i / v_i,  m = v Σ w_i m_i / v_i        soup:  v = Σ w_i v_i,  m of the network Σ w_i s_i B_i A_i

and p_ref the same of the base's prediction and the variances before training.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch.func import functional_call
from torch.nn import functional

from stepfuse.fuse.diffusion.variance import LearnedSchedule
from stepfuse.train.algorithms import ALGORITHMS
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import PairedStep, SampledStep
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_joint import GUIDANCE_SCALE, JointWorld, joint_settings
from tests.fixtures_training import BETAS, SHAPE, tiny_unet

SQUARES = DDIMScheduler(**BETAS).alphas_cumprod.double()
ETAS, BETA, CLIP = (0.8, 0.5), (0.1, 0.3), 0.2
OFFSETS = ((0.5, -0.75, 0.25), (-0.5, 0.25, 1.0))
# Two images under one mixture, and one at each end.
WEIGHTS = torch.tensor([[0.3, 0.7], [0.0, 1.0], [0.3, 0.7], [1.0, 0.0]], dtype=torch.float64)
BASE, ENDS = (0, 0), ((1, 0), (0, 1))
ADVANTAGES = torch.tensor([1.5, -0.7, 0.4, -1.1], dtype=torch.float64)
KINDS = {"ddpo": DDPOSettings, "dpo": DPOSettings}


def numbers(seed):
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settings_of(algorithm, rule, guidance):
    objectives = [dict(reward=name, beta=beta) for name, beta in zip("ab", BETA, strict=True)]
    objectives[1]["rank"] = 2
    return joint_settings(KINDS[algorithm], *objectives, train_rule=rule, guidance=guidance)


class Written:
    """The densities of a step, from forwards of the base with other weights."""

    def __init__(self, world, rule, guidance):
        self.base = tiny_unet().double()
        self.layers = {path: m for path, m in world.unet.named_modules() if hasattr(m, "lora_A")}
        self.world, self.product, self.guidance = world, rule == "product", guidance
        self.offsets = [world.policy.get_parameter(f"offsets_{name}") for name in "ab"]

    def network(self, weights, kind, x, t, image):
        changed = {}
        for path, layer in self.layers.items():
            added = [
                w * layer.scaling[name] * (layer.lora_B[name].weight.flatten(1) @ layer.lora_A[name].weight.flatten(1))
                for name, w in zip("ab", weights, strict=True)
            ]
            weight = self.base.get_parameter(f"{path}.weight")
            changed[f"{path}.weight"] = weight + sum(added).view_as(weight)
        states = getattr(self.world.conditioning, kind)["prompt_embeds"][image : image + 1]
        return functional_call(self.base, changed, (x, t, states)).sample

    def guided(self, weights, x, t, image):
        positive = self.network(weights, "positive", x, t, image)
        if self.guidance == "off":
            return positive
        of = weights if self.guidance == "full" else BASE
        negative = self.network(of, "negative", x, t, image)
        return negative + GUIDANCE_SCALE * (positive - negative)

    def variance(self, i, t, s, *, trained):
        """sigma_s² E p / (1 - p + E p), with the offset interpolated over three knots."""
        a_t, a_s = SQUARES[t], SQUARES[s]
        p = ETAS[i] ** 2 * (1 - a_t / a_s) / (1 - a_t)  # eta² times eq. 16 in units of sigma_s²
        if not trained:
            return (1 - a_s) * p
        place = 2 * t / 999
        low = int(place)
        offset = (1 - (place - low)) * self.offsets[i][low] + (place - low) * self.offsets[i][low + 1]
        return (1 - a_s) * offset.exp() * p / (1 - p + offset.exp() * p)

    def mean(self, x, e, t, s, v):
        a_t, a_s = SQUARES[t], SQUARES[s]
        return a_s.sqrt() * (x - (1 - a_t).sqrt() * e) / a_t.sqrt() + (1 - a_s - v).sqrt() * e

    def fused(self, x, t, s, image, *, trained):
        """Mean and variance of the policy, or of the reference, for one image."""
        w = WEIGHTS[image].tolist()
        v = [self.variance(i, t, s, trained=trained) for i in range(2)]
        if not self.product:
            total = w[0] * v[0] + w[1] * v[1]
            return self.mean(x, self.guided(w if trained else BASE, x, t, image), t, s, total), total
        total, mean = 1 / (w[0] / v[0] + w[1] / v[1]), 0
        for i in range(2):
            if w[i]:
                e = self.guided(ENDS[i] if trained else BASE, x, t, image)
                mean = mean + total * w[i] / v[i] * self.mean(x, e, t, s, v[i])
        return mean, total

    def densities(self, x_t, t, s):
        """Of the policy and of the reference, for every image."""
        return [[self.fused(x_t[k : k + 1], t, s, k, trained=trained) for trained in (True, False)] for k in range(4)]

    @torch.no_grad()
    def of_base(self, x_t, t):
        """What a rollout stores of the base."""
        reference = torch.cat([self.guided(BASE, x_t[k : k + 1], t, k) for k in range(4)])
        if self.guidance != "shared":
            return dict(negative=None, reference=reference)
        negative = torch.cat([self.network(BASE, "negative", x_t[k : k + 1], t, k) for k in range(4)])
        return dict(negative=negative, reference=reference)


def log_density(gaussian, x):
    mean, variance = gaussian
    return -(((x - mean) ** 2 / variance + (2 * math.pi * variance).log()) / 2).sum()


def divergence(gaussian, other):
    (mean, variance), (at, of) = gaussian, other
    return (((mean - at) ** 2 / of + variance / of - 1 - (variance / of).log()) / 2 * torch.ones(SHAPE)).sum()


def step_of(algorithm, known, laws):
    """A stored step: what was drawn from the densities, here of the policy itself."""
    policies = [policy for policy, _ in laws]
    drawn = [torch.cat([m + v.sqrt() * n for (m, v), n in zip(policies, numbers(j), strict=True)]) for j in (20, 21)]
    chosen, rejected = (x.detach() for x in drawn)
    if algorithm == "dpo":
        return PairedStep(**known, chosen=chosen, rejected=rejected, kept=torch.tensor([True, True, False, True]))
    log_probs = torch.stack([log_density(policy, x) for policy, x in zip(policies, chosen, strict=True)])
    old = log_probs.detach() + torch.tensor([0.05, -0.1, 0.02, 0.5])  # of the last, so far that it is clipped
    return SampledStep(**known, x_s=chosen, log_prob=old, advantage=ADVANTAGES)


def written_loss(algorithm, step, laws):
    """By image DDPO's loss and β KL, or DPO's, with β = Σ w_i β_i."""
    values = []
    for k, (policy, base) in enumerate(laws):
        beta = sum(w * b for w, b in zip(WEIGHTS[k].tolist(), BETA, strict=True))
        if algorithm == "dpo":
            h = [log_density(policy, x[k]) - log_density(base, x[k]) for x in (step.chosen, step.rejected)]
            values.append(-functional.logsigmoid(beta * (h[0] - h[1])) * step.kept[k])
            continue
        ratio, advantage = (log_density(policy, step.x_s[k]) - step.log_prob[k]).exp(), step.advantage[k]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
        values.append(loss + beta * divergence(policy, base))
    return torch.stack(values).mean()


def joint_loss(algorithm, world, steps, together):
    """The same by what a training calls, the steps in one forward pass or each in its own."""
    groups, losses = [steps] if together else [[step] for step in steps], []
    for group in groups:
        gaussians = step_gaussians(world.policy, world.sampling, group, world.conditioning)
        for (policy, reference), step in zip(gaussians, group, strict=True):
            loss = algorithm.loss(policy, reference, step)
            if algorithm.adds_kl:
                loss = loss + algorithm.beta(algorithm.weights(step)) * policy.kl(reference)
            losses.append(loss.mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("guidance", ["off", "shared", "full"])
@pytest.mark.parametrize("rule", ["product", "soup"])
def test_loss_and_gradients_are_those_of_the_written_out_density(rule, guidance):
    """Of DDPO and of DPO, with learned schedules on etas of their own; also for two steps in one forward pass."""
    settings = {name: settings_of(name, rule, guidance) for name in KINDS}
    schedules = [LearnedSchedule(offsets=torch.tensor(o), eta=eta) for o, eta in zip(OFFSETS, ETAS, strict=True)]
    world = JointWorld(settings["ddpo"], schedules=schedules, dtype=torch.float64, images=4)
    written, known, laws = Written(world, rule, guidance), [], []
    for index, (t, s) in enumerate(world.sampling.steps[:2]):
        x_t = numbers(10 + index)
        laws.append(written.densities(x_t, t, s))
        known.append(dict(index=index, x_t=x_t, t=t, s=s, weights=WEIGHTS) | written.of_base(x_t, t))
    trained = {key: value for key, value in world.policy.named_parameters() if value.requires_grad}
    for name, own in settings.items():
        algorithm = ALGORITHMS[name](own)
        steps = [step_of(name, of, law) for of, law in zip(known, laws, strict=True)]
        expected = sum(written_loss(name, step, law) for step, law in zip(steps, laws, strict=True)) / 2
        wanted = torch.autograd.grad(expected, list(trained.values()), retain_graph=True)
        assert min(value.abs().max() for value in wanted) > 1e-4
        for together in (False, True):
            loss = joint_loss(algorithm, world, steps, together)
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
            found = torch.autograd.grad(loss, list(trained.values()))
            for key, value, other in zip(trained, found, wanted, strict=True):
                torch.testing.assert_close(value, other, rtol=0, atol=1e-8, msg=f"{name} {key}")
