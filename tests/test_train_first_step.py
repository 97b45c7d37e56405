"""Before the first update: the policy is its reference, bit for bit, and stored log-probs are met again exactly."""

import dataclasses
import math

import pytest
import torch

from stepfuse.fuse.diffusion.variance import LearnedSchedule
from stepfuse.train.algorithms import DPO
from stepfuse.train.losses import ddpo_loss
from stepfuse.train.rollout import rollout
from stepfuse.train.settings import DPOSettings
from tests.fixtures_training import BENT, ETA, PolicyWorld

# The policy starts as its reference


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
@pytest.mark.parametrize("schedule", [ETA, LearnedSchedule(offsets=torch.zeros(5), eta=0.8)], ids=["eta", "learned"])
def test_dpo_loss_of_a_fresh_lora_is_exactly_log_2(guidance, schedule):
    world = PolicyWorld(guidance=guidance, schedule=schedule)
    for step in world.pairs():
        policy, reference = world.gaussians(step)
        assert torch.equal(policy.mean, reference.mean)
        assert torch.equal(policy.variance, reference.variance)
        loss = DPO(DPOSettings(beta=0.5)).loss(policy, reference, step)
        assert loss.tolist() == [torch.tensor(math.log(2)).item()] * 2


def test_kl_of_a_fresh_lora_is_exactly_zero():
    world = PolicyWorld()
    for step in world.pairs():
        policy, reference = world.gaussians(step)
        assert policy.kl(reference).tolist() == [0, 0]


def test_a_trained_lora_is_not_its_reference():
    world = PolicyWorld(trained=True)
    for step in world.pairs():
        policy, reference = world.gaussians(step)
        assert (policy.kl(reference) > 1e-4).all()


def test_swapping_winner_and_loser_turns_the_gradient_round():
    world = PolicyWorld()
    (step, *_) = world.pairs()
    gradients = []
    for pair in (step, dataclasses.replace(step, chosen=step.rejected, rejected=step.chosen)):
        world.unet.zero_grad()
        DPO(DPOSettings(beta=0.5)).loss(*world.gaussians(pair), pair).mean().backward()
        gradients.append([factor.grad.clone() for factor in world.factors("lora_B")])
    for forward, backward in zip(*gradients, strict=True):
        assert torch.equal(forward, -backward)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-3


def test_offsets_come_from_the_policy_and_the_reference_keeps_the_variance_it_had():
    world = PolicyWorld(schedule=LearnedSchedule(offsets=torch.zeros(3), eta=0.8))
    (step, *_) = world.pairs()
    world.policy.offsets.data.fill_(math.log(2))
    policy, reference = world.gaussians(step)
    _, limit = world.denoiser.path.at(step.s, step.x_t)  # sigma_s
    v, v_ref = (g.variance / limit**2 for g in (policy, reference))
    torch.testing.assert_close(v / (1 - v), 2 * v_ref / (1 - v_ref))  # an offset is one of the logit of v / sigma_s²
    torch.testing.assert_close(
        reference.variance, 0.64 * world.denoiser.path.ancestral_variance(step.t, step.s, step.x_t)
    )
    policy.log_prob(step.chosen).sum().backward()
    # t = 667 of 999 lies between the second of three knots and the third, a third of the way
    low, middle, high = world.policy.offsets.grad.tolist()
    assert (low, high / middle) == (0, pytest.approx((2 * 667 / 999 - 1) / (2 - 2 * 667 / 999), rel=1e-4))


# Log-probs of a rollout are met again


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
@pytest.mark.parametrize("schedule", [ETA, BENT], ids=["eta", "learned"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_first_ddpo_ratio_is_exactly_1(guidance, schedule, precision):
    half = precision == "bf16"
    world = PolicyWorld(
        guidance=guidance, schedule=schedule, dtype=torch.bfloat16 if half else torch.float32, trained=True
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        steps = rollout(*world.place).steps
    assert len(steps) == 3
    for step in steps:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            policy, reference = world.gaussians(step)
        log_prob = policy.log_prob(step.x_s)
        assert log_prob.requires_grad
        assert log_prob.tolist() == step.log_prob.tolist()
        assert (policy.kl(reference) > 1e-4).all()  # so it is not by the LoRA being nothing
        advantage = torch.tensor([2.0, -0.5])
        assert ddpo_loss(log_prob, step.log_prob, advantage, clip_range=1e-6).tolist() == (-advantage).tolist()


def test_bf16_keeps_latents_and_the_lora_in_float32():
    world = PolicyWorld(dtype=torch.bfloat16, trained=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (step, *_) = rollout(*world.place).steps
        policy, _ = world.gaussians(step)
    assert {p.dtype for p in world.factors("lora_")} == {torch.float32}
    assert {t.dtype for t in (step.x_t, step.x_s, step.log_prob, policy.mean, policy.variance)} == {torch.float32}
    # the stored x_s has more digits than bf16 holds, so no rounding came between drawing and scoring it
    assert not torch.equal(step.x_s, step.x_s.bfloat16().float())
    policy.log_prob(step.x_s).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in world.factors("lora_"))


def test_gradient_checkpointing_leaves_gradients_alone():
    gradients = []
    for checkpointing in (False, True):
        world = PolicyWorld(trained=True)
        if checkpointing:
            world.unet.enable_gradient_checkpointing()
        (step, *_) = world.pairs()
        policy, _ = world.gaussians(step)
        policy.log_prob(step.chosen).sum().backward()
        gradients.append([p.grad for p in world.factors("lora_")])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
