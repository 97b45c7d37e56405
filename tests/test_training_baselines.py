"""The loops of ddpo-pytorch and SPO as restated for the benchmark: that they compute what they are called."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch.testing import assert_close

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, step_variance
from stepfuse.fuse.rules.plan import Expert
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.scripts.baselines.ddpo_pytorch import DDPOPyTorch, ddpo_pytorch_loss
from stepfuse.scripts.baselines.spo import SPO, extremes, spo_loss
from stepfuse.scripts.baselines.training import Task, ddim_step, mean_log_prob
from stepfuse.scripts.benchmark.models import with_copied_network
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import Policy
from stepfuse.train.losses import ddpo_loss, dpo_loss
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import PairedStep, SampledStep
from tests.fixtures_tiny import networks, refused, save_stable_diffusion_xl
from tests.fixtures_training import save_tiny_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
IMAGES, STEPS, CANDIDATES = 3, 5, 2
SKIPPED = 1  # a fifth of the steps
pytestmark = pytest.mark.usefixtures("own_accelerator")


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_pipeline(str(tiny_base))


@pytest.fixture
def task(base):
    return Task(
        pipeline=with_copied_network(base),
        accelerator=Accelerator(cpu=True),
        reward=colourfulness,
        prompts=["a red apple", "a cat"],
        targets=ATTENTION,
        images=IMAGES,
        steps=STEPS,
    )


def not_the_base(loop, size):
    """Give a loop's LoRA factors that are not zero; how large they are says how far its policy is from the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loop.trainable:
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def gradients(loop):
    found = [parameter.grad.clone() for parameter in loop.trainable]
    for parameter in loop.trainable:
        parameter.grad = None
    assert any(bool((gradient.abs() > 1e-6).any()) for gradient in found)
    return found


def gaussians(loop, step, conditioning):
    """Policy and reference of a step as ours has them, where each guides itself."""
    denoiser = Denoiser(
        backbone=loop.backbone,
        path=loop.backbone.path(),
        guidance=Guidance(source="full", scale=loop.task.guidance_scale),
    )
    schedule = EtaSchedule(eta=1.0)
    sampling = Sampling(
        denoiser=denoiser,
        objectives=(Expert.adapter("baseline", schedule),),
        steps=[(step.t, step.s)],
        shape=loop.shape,
    )
    policy = Policy(loop.backbone, ["baseline"], [schedule])
    (base,) = denoiser.predictions(step.x_t, step.t, conditioning, networks(None))
    step = replace(step, reference=base.detach())
    (both,) = step_gaussians(policy, sampling, [step], conditioning)
    return both


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_ddim_step_and_its_log_prob_are_ours_divided_by_the_dimension(kind):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    path = NoisePath.from_scheduler(scheduler)
    x_t, prediction, x_s = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for t, s in path.steps(STEPS):
        gaussian = transition(path, x_t, prediction, t, s, step_variance(EtaSchedule(), path, t, s, x_t))
        x_0, mean, deviation = ddim_step(scheduler, prediction, torch.tensor([t, t]), x_t)
        assert_close(x_0, path.clean_and_noise(x_t, prediction, t)[0])
        assert_close(mean, gaussian.mean, atol=1e-5, rtol=1e-4)
        assert_close(mean_log_prob(x_s, mean, deviation), gaussian.log_prob(x_s) / 256, atol=1e-4, rtol=1e-3)


def test_the_gradient_of_ddpo_pytorch_is_that_of_our_loss_with_full_guidance(task):
    loop = DDPOPyTorch(task)
    not_the_base(loop, 0.05)
    samples = loop.rollout()
    shift = torch.linspace(-3e-4, 3e-4, IMAGES)[:, None]  # some ratios are clipped, which are within 1e-4 of 1
    samples = replace(samples, log_prob=samples.log_prob + shift, advantage=torch.tensor([1.0, -7.0, 0.5]))
    loop.learn(samples)
    theirs = gradients(loop)
    for place, (t, s) in enumerate(NoisePath.from_scheduler(loop.scheduler).steps(STEPS)):
        assert (samples.times[:, place] == t).all()
        x_t, x_s, old = samples.x_t[:, place], samples.x_s[:, place], samples.log_prob[:, place]
        step = SampledStep(
            index=0,
            x_t=x_t,
            t=t,
            s=s,
            weights=torch.ones(len(x_t), 1),
            negative=None,
            reference=x_t,
            x_s=x_s,
            log_prob=old,
        )
        policy, _ = gaussians(loop, step, samples.conditioning)
        advantage = samples.advantage.clamp(-5, 5)
        values = ddpo_loss(policy.log_prob(x_s) / x_t[0].numel(), old, advantage, clip_range=1e-4)
        (values.mean() / STEPS).backward()
    for own, their in zip(gradients(loop), theirs, strict=True):
        assert_close(own, their, atol=1e-7, rtol=1e-3)


def test_the_gradient_of_spo_is_that_of_our_loss_with_full_guidance_within_its_clip(task):
    loop = SPO(task, candidates=CANDIDATES, skip_first_steps=SKIPPED)
    not_the_base(loop, 0.02)
    pairs = loop.rollout()
    assert len(pairs.times) == IMAGES * (STEPS - SKIPPED)
    loop.learn(pairs)
    theirs = gradients(loop)
    for t, s in NoisePath.from_scheduler(loop.scheduler).steps(STEPS)[SKIPPED:]:
        part = pairs[pairs.times == t]
        own = dict(x_t=part.x_t, chosen=part.winner, rejected=part.loser, kept=torch.ones_like(part.times).bool())
        step = PairedStep(
            index=0, **own, t=t, s=s, weights=torch.ones(len(part.x_t), 1), negative=None, reference=part.x_t
        )
        policy, reference = gaussians(loop, step, part.conditioning)
        logs = [g.log_prob(x) / 256 for g in (policy, reference) for x in (part.winner, part.loser)]
        ratios = [own - base for own, base in zip(logs[:2], logs[2:], strict=True)]
        assert all(bool((ratio.abs() < math.log(1.1)).all()) for ratio in ratios)  # none is clipped
        (dpo_loss(*logs, beta=10.0).sum() / len(pairs.times)).backward()
    for own, their in zip(gradients(loop), theirs, strict=True):
        assert_close(own, their, atol=1e-7, rtol=1e-3)


def test_spo_clips_each_ratio_by_itself():
    """log r of +0.5 and -0.5 become log 1.1 and log 0.9: -log σ(10 (log 1.1 - log 0.9))."""
    zero, half = torch.zeros(1), torch.full((1,), 0.5)
    wanted = math.log(1 + math.exp(-10 * (math.log(1.1) - math.log(0.9))))
    assert spo_loss(half, zero, -half, zero).item() == pytest.approx(wanted)


def test_the_loss_and_gradient_of_spo_are_those_of_our_clamped_loss():
    ratios = torch.linspace(-0.2, 0.2, 24)  # their logarithms; clamped below log 0.9 and above log 1.1
    references = [torch.linspace(-3.0, 1.0, 24), torch.linspace(0.0, 2.0, 24)]
    logs = [references[0] + ratios, references[1] + ratios.roll(7), *references]  # of winner, loser and references
    own, theirs = ([value.clone().requires_grad_() for value in logs[:2]] for _ in range(2))
    ours = dpo_loss(*own, *logs[2:], beta=10.0, clip_range=0.1).mean()
    spo = spo_loss(theirs[0], logs[2], theirs[1], logs[3])
    assert_close(ours, spo)
    for value, their in zip(torch.autograd.grad(ours, own), torch.autograd.grad(spo, theirs), strict=True):
        assert_close(value, their)
        assert 0 < (value == 0).sum() < len(value)  # some are clamped


def test_ddpo_pytorch_takes_the_worse_of_both_ratios():
    """A = 2, 9 (5 within ±5) and -1 with ratios e^0.1: -2.0002, -5.0005 and 1 e^0.1."""
    log_prob, advantage = torch.full((3,), 0.1), torch.tensor([2.0, 9.0, -1.0])
    wanted = (-2 * 1.0001 - 5 * 1.0001 + math.exp(0.1)) / 3
    assert ddpo_pytorch_loss(log_prob, torch.zeros(3), advantage).item() == pytest.approx(wanted)


def test_winner_and_loser_are_the_highest_and_lowest_and_ties_are_dropped():
    rewards = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0], [2.0, 6.5, 2.0]])  # candidates, images
    best, worst, kept = extremes(rewards, 0.0)
    assert (best.tolist()[:2], worst.tolist()[:2]) == ([1, 2], [0, 1])
    assert kept.tolist() == [True, True, False]
    assert extremes(rewards, 2.0)[2].tolist() == [False, True, False]


def test_the_reward_says_which_candidate_of_spo_wins(task):
    """Of the last step, whose candidates are scored as they are; earlier ones by the x_0 predicted from them."""
    scored = []

    def reward(pixels, prompts):
        scored.append(colourfulness(pixels, prompts))
        return scored[-1]

    loop = SPO(replace(task, reward=reward), candidates=3, skip_first_steps=SKIPPED)
    pairs = loop.rollout()
    assert [len(values) for values in scored] == [3 * IMAGES] * (STEPS - SKIPPED)
    last = pairs[pairs.times == pairs.times.min()]
    for latents, extreme in ((last.winner, torch.amax), (last.loser, torch.amin)):
        with torch.no_grad():
            found = colourfulness(loop.backbone.decode(latents), [])
        assert_close(found, extreme(scored[-1].reshape(3, IMAGES), 0))


def test_a_reward_that_is_one_for_all_leaves_spo_nothing_to_learn_from(task):
    loop = SPO(replace(task, reward=lambda pixels, prompts: torch.zeros(len(pixels))), candidates=2)
    with refused("the same reward"):
        loop.learn(loop.rollout())


@pytest.mark.parametrize("save", [save_tiny_pipeline, save_stable_diffusion_xl])
def test_prompts_are_embedded_as_the_pipeline_does_it(task, tmp_path, save):
    save(tmp_path / "base")
    pipeline = load_pipeline(str(tmp_path / "base"))
    loop = SPO(replace(task, pipeline=pipeline), candidates=2, skip_first_steps=SKIPPED)
    prompts, found, x_T = loop.begin()
    wanted = backbone_of(pipeline).encode(prompts)
    assert_close(vars(found), vars(wanted))
    assert x_T.shape == (IMAGES, *backbone_of(pipeline).shape())
    loop.step()


def test_an_optimiser_step_moves_the_lora_alone(task, base):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    for loop in (DDPOPyTorch(task), SPO(replace(task, pipeline=with_copied_network(base)), skip_first_steps=SKIPPED)):
        start = [parameter.clone() for parameter in loop.trainable]
        loop.step()
        assert any(not torch.equal(a, b) for a, b in zip(start, loop.trainable, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_spo_holds_a_second_unet_and_ddpo_pytorch_none(task, base):
    spo = SPO(task)
    trained, reference = ({p.data_ptr() for p in network.parameters()} for network in spo.networks)
    assert not trained & reference
    assert_close(dict(spo.reference.named_parameters()), dict(base.unet.named_parameters()))
    loop = DDPOPyTorch(replace(task, pipeline=with_copied_network(base)))
    assert loop.networks == (loop.network,)
