"""The loop of Flow-GRPO as restated for the benchmark: that it computes what it is called."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.sde import SDESchedule
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import step_variance
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.scripts.baselines.flow_grpo import FlowGRPO, euler_maruyama
from stepfuse.scripts.baselines.training import Task
from stepfuse.scripts.benchmark.models import with_copied_network
from stepfuse.train.losses import ddpo_loss
from tests.fixtures_families import save_family
from tests.fixtures_tiny import networks

IMAGES, STEPS, LEVEL, BETA = 3, 4, 0.7, 0.04
pytestmark = pytest.mark.usefixtures("own_accelerator")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_pipeline(str(save_family("sd3", tmp_path_factory.mktemp("sd3") / "base")))


@pytest.fixture
def loop(base):
    task = Task(
        pipeline=with_copied_network(base),
        accelerator=Accelerator(cpu=True),
        reward=colourfulness,
        prompts=["a red apple", "a cat"],
        targets=backbone_of(base).targets,
        images=IMAGES,
        steps=STEPS,
    )
    loop = FlowGRPO(task, noise_level=LEVEL, beta=BETA)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loop.trainable:  # B is zero, and the policy the base
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return loop


def test_an_euler_maruyama_step_by_hand():
    """From t = 0.5 to s = 0.25 with a = 1: g = 1, x + (v + x + v / 2) (-0.25), deviation sqrt(0.25)."""
    x, v = torch.tensor([[[[2.0]]]]), torch.tensor([[[[4.0]]]])
    mean, deviation, diffusion = euler_maruyama(torch.tensor([0.5, 0.25]), v, 0, x, 1.0)
    assert (mean.item(), deviation.item(), diffusion.item()) == (2 - 0.25 * (4 + 2 + 2), 0.5, 1)


def test_where_t_is_1_the_next_level_bounds_the_diffusion():
    """g² = 1 / (1 - 0.75), and the deviation is 2 sqrt(0.25)."""
    x = torch.zeros(1, 1, 1, 1)
    _, deviation, diffusion = euler_maruyama(torch.tensor([1.0, 0.75, 0.0]), x, 0, x, 1.0)
    assert (deviation.item(), diffusion.item()) == (1, 2)


def test_of_short_steps_its_gaussian_is_that_of_our_sde(base):
    path = backbone_of(base).path()
    steps = path.steps(1000)
    sigmas = torch.tensor([steps[0][0], *(s for _, s in steps)], dtype=torch.float64)
    x, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    for i in (300, 500, 900):
        mean, deviation, _ = euler_maruyama(sigmas, v, i, x, LEVEL)
        t, s = steps[i]
        ours = transition(path, x, v, t, s, step_variance(SDESchedule(noise_level=LEVEL), path, t, s, x))
        assert_close(mean, ours.mean, atol=1e-4, rtol=0)
        assert_close(deviation**2, ours.variance.squeeze(), atol=0, rtol=0.02)
        assert (mean - x).abs().max() > 1e-3  # the steps are not so short that nothing moves


def test_the_gradient_is_that_of_our_loss_and_our_kl_for_the_same_gaussians(loop):
    """With x_0 and e of the prediction the mean is (1 - s) x_0 + (s - v / (2 t)) e, v = g² (t - s)."""
    samples = loop.rollout()
    shift = torch.linspace(-3e-4, 3e-4, IMAGES)[:, None]  # some ratios are clipped, which are within 1e-4 of 1
    samples = replace(samples, log_prob=samples.log_prob + shift, advantage=torch.tensor([1.0, -7.0, 0.5]))
    loop.learn(samples)
    theirs = [parameter.grad.clone() for parameter in loop.trainable]
    for parameter in loop.trainable:
        parameter.grad = None
    assert any(bool((gradient.abs() > 1e-6).any()) for gradient in theirs)

    path, scale, conditioning = loop.backbone.path(), loop.task.guidance_scale, samples.conditioning
    plain, guided = (
        Denoiser(backbone=loop.backbone, path=path, guidance=Guidance(source=source, scale=scale))
        for source in ("off", "full")
    )
    levels = loop.scheduler.sigmas.tolist()
    for i, (t, s) in enumerate(pairwise(levels[:-1])):
        x_t, x_s = samples.x_t[:, i], samples.x_s[:, i]
        nearest = levels[1] if t == 1 else t
        variance = torch.full((1, 1, 1, 1), LEVEL**2 * t / (1 - nearest) * (t - s))

        def gaussian(velocity, x_t=x_t, t=t, s=s, variance=variance):
            x_0, e = path.clean_and_noise(x_t, velocity, t)
            return Gaussian(mean=(1 - s) * x_0 + (s - variance / (2 * t)) * e, variance=variance)

        with torch.no_grad():
            both = guided.predictions(x_t, t, conditioning, networks("baseline", None))
        (positive,) = plain.predictions(x_t, t, conditioning, networks("baseline"))
        negative = (scale * positive - both[0]).detach() / (scale - 1)
        policy, reference = gaussian(negative + scale * (positive - negative)), gaussian(both[1])
        dimension = x_t[0].numel()
        advantage = samples.advantage.clamp(-5, 5)
        loss = ddpo_loss(policy.log_prob(x_s) / dimension, samples.log_prob[:, i], advantage, clip_range=1e-4)
        kl = policy.kl(reference) / dimension * (t - s)  # theirs leaves the length of the step out of the variance
        ((loss + BETA * kl).mean() / (STEPS - 1)).backward()
    for parameter, their in zip(loop.trainable, theirs, strict=True):
        assert_close(parameter.grad, their, atol=1e-6, rtol=2e-3)


def test_the_log_prob_of_a_rollout_is_that_of_its_update(loop):
    """Which has the ratio 1, where the loss is minus the mean of the advantages, 0, and only the KL remains."""
    samples = loop.rollout()
    for i in range(STEPS):
        mean, deviation, _ = loop.gaussian(loop.trained, samples.x_t[:, i], i, samples.conditioning)
        log_prob = torch.distributions.Normal(mean, deviation).log_prob(samples.x_s[:, i]).mean((1, 2, 3))
        assert_close(log_prob.detach(), samples.log_prob[:, i], atol=1e-5, rtol=1e-5)
    assert samples.advantage.mean().abs() < 1e-5


def test_all_images_of_a_rollout_have_one_prompt_embedded_as_the_pipeline_does_it(loop):
    prompts, found, x_T = loop.begin()
    assert len(set(prompts)) == 1
    assert_close(vars(found), vars(loop.backbone.encode(prompts)))
    assert x_T.shape == (IMAGES, *loop.backbone.shape())


def test_an_optimiser_step_moves_the_lora_alone_and_leaves_it_switched_on(loop, base):
    before = {name: value.clone() for name, value in base.transformer.state_dict().items()}
    start = [parameter.detach().clone() for parameter in loop.trainable]
    drawn = loop.rollout().log_prob
    loop.step()
    assert any(not torch.equal(a, b) for a, b in zip(start, loop.trainable, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in base.transformer.state_dict().items())
    assert all(parameter.requires_grad for parameter in loop.trainable)
    assert drawn.shape == (IMAGES, STEPS)
