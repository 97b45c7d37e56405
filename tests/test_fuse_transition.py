"""Noise paths and the transition against the steps of diffusers' schedulers, and against Bayes' rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from stepfuse.fuse.diffusion.noise_path import FINAL, NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, step_variance

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
SHAPE = (2, 3, 4, 4)


def random(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float64(scheduler):
    """The same tables in float64: diffusers takes 1 - alpha² in the table's type, which costs it 1e-7."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def ddim(**config):
    return in_float64(DDIMScheduler(**BETAS, clip_sample=False, **config))


def assert_near(got, expected, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_trajectory_equals_ddim(config, eta, count):
    scheduler, path = ddim(**config), NoisePath.from_scheduler(ddim(**config))
    scheduler.set_timesteps(count)
    times, steps = scheduler.timesteps.tolist(), path.steps(count)
    assert [t for t, _ in steps] == times
    x_t = random(0)
    for k, (t, s) in enumerate(steps):
        prediction, noise = random(2 * k + 1), random(2 * k + 2)
        v = step_variance(EtaSchedule(eta=eta), path, t, s, x_t)
        gaussian = transition(path, x_t, prediction, t, s, v)
        mean = scheduler.step(prediction, t, x_t, eta=eta, variance_noise=torch.zeros(SHAPE)).prev_sample
        std = eta * scheduler._get_variance(t, t - 1000 // count) ** 0.5
        drawn = scheduler.step(prediction, t, x_t, eta=eta, variance_noise=noise).prev_sample
        assert_near(gaussian.mean, mean)
        assert_near(gaussian.variance.sqrt(), std.expand_as(gaussian.variance))
        assert_near(gaussian.mean + gaussian.variance.sqrt() * noise, drawn)
        x_t = drawn
    return steps


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize(
    "spacing", [dict(timestep_spacing="leading", steps_offset=1), dict(timestep_spacing="trailing")]
)
def test_every_step_of_a_trajectory_equals_ddim(spacing, set_alpha_to_one, prediction_type, eta):
    config = dict(spacing, set_alpha_to_one=set_alpha_to_one, prediction_type=prediction_type)
    steps = assert_trajectory_equals_ddim(config, eta, count=10)
    assert steps[-1][1] == FINAL


@pytest.mark.parametrize("count", [1, 7, 30, 300])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_that_do_not_divide_the_training_times_equal_ddim(spacing, count):
    """DDIM goes to t - 1000 // count whatever time comes next, so that the last s need not be FINAL."""
    assert_trajectory_equals_ddim(dict(timestep_spacing=spacing), 0.3, count)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_path_that_starts_in_pure_noise_equals_ddim(prediction_type):
    """Zero terminal SNR (arXiv:2305.08891): alpha_T = 0."""
    config = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction_type)
    path = NoisePath.from_scheduler(ddim(**config))
    assert path.alpha[999] == 0
    assert_trajectory_equals_ddim(config, 0.3, count=10)


@pytest.mark.parametrize(
    ("scheduler", "t", "s"),
    [(ddim(), [900, 300], [800, FINAL]), (FlowMatchEulerDiscreteScheduler(), [0.9, 0.3], [0.8, 0.0])],
)
def test_one_time_a_sample_equals_separate_calls(scheduler, t, s):
    path = NoisePath.from_scheduler(scheduler)
    x_t, prediction = random(0), random(1)
    t, s = (torch.tensor(times, dtype=torch.float64 if isinstance(times[0], float) else None) for times in (t, s))
    v = step_variance(EtaSchedule(eta=0.7), path, t, s, x_t)
    together = transition(path, x_t, prediction, t, s, v)
    for row in range(2):
        one = slice(row, row + 1)
        alone = transition(path, x_t[one], prediction[one], t[row].item(), s[row].item(), v[one])
        assert torch.equal(together.mean[one], alone.mean)


def test_ddpm_is_eta_one():
    """Another library's ancestral sampler, with a mean from another formula (DDPM, arXiv:2006.11239, eq. 7)."""
    scheduler = in_float64(DDPMScheduler(**BETAS, clip_sample=False))
    scheduler.one = scheduler.one.double()
    path = NoisePath.from_scheduler(DDPMScheduler(**BETAS, clip_sample=False))
    path_steps = path.steps(10)
    scheduler.set_timesteps(10)
    x_t = random(0)
    for k, (t, s) in enumerate(path_steps):
        prediction = random(k + 1)
        gaussian = transition(path, x_t, prediction, t, s, step_variance(EtaSchedule(eta=1.0), path, t, s, x_t))
        expected = scheduler.step(prediction, t, x_t, generator=torch.Generator().manual_seed(k)).prev_sample
        # DDPMScheduler multiplies alphas anew in float32: 1e-7 of the values, more where 1 - alpha² is small.
        assert_near(gaussian.sample(torch.Generator().manual_seed(k)), expected, 2e-5)
        x_t = expected


# Flow matching


def assert_flow_equals_euler(scheduler, path, count, mu=None):
    """Every step of a run with the velocity of a network that depends on x_t and on the time it is given."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=mu)
    steps = path.steps(count)
    assert len(steps) == count
    assert (steps[0][0], steps[-1][1]) == (1.0, 0.0)
    ours = theirs = random(0).float()
    for k, (t, s) in enumerate(steps):
        assert path.network_time(t).item() == pytest.approx(scheduler.timesteps[k].item(), rel=2e-7)
        velocity = [(x * scheduler.timesteps[k] / 1000).sin() for x in (ours, theirs)]
        v = step_variance(EtaSchedule(eta=0.0), path, t, s, ours)
        ours = transition(path, ours, velocity[0], t, s, v).mean
        theirs = scheduler.step(velocity[1], scheduler.timesteps[k], theirs).prev_sample
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()  # float32: 6e-8 a step, 400 steps


@pytest.mark.parametrize("count", [10, 28, 50, 400])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_deterministic_flow_run_equals_euler_for_any_number_of_steps(shift, count):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert_flow_equals_euler(scheduler, NoisePath.from_scheduler(scheduler), count)


@pytest.mark.parametrize("count", [10, 50, 400])
@pytest.mark.parametrize("options", [{}, {"shift_terminal": 0.02}, {"time_shift_type": "linear"}])
def test_a_flow_run_with_a_shift_by_size_equals_euler(count, options):
    """FLUX.1's mu at 512 pixels is 0.63, and exponential: sigma' = e^mu / (e^mu + 1 / sigma - 1)."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    path = replace(NoisePath.from_scheduler(scheduler), mu=0.63)
    assert_flow_equals_euler(scheduler, path, count, mu=0.63)


def test_a_shift_by_size_without_the_size_is_refused():
    path = NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match=r"depend on the size of images.*set shift instead"):
        path.steps(10)


def test_the_times_of_a_flow_are_evenly_spaced_sigmas_shifted_once():
    """sigma' = a sigma / (1 + (a - 1) sigma): 3 · 0.5 / (1 + 2 · 0.5) = 0.75 of shift 3."""
    path = NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert path.steps(2) == [(1.0, 0.75), (0.75, 0.0)]


def test_shares_run_from_the_least_to_the_most_noise():
    flow, table = NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler()), NoisePath.from_scheduler(ddim())
    assert flow.share(torch.tensor([0.25, 1.0])).tolist() == [0.25, 1.0]
    assert table.share(torch.tensor([0, 333, 999, FINAL])).tolist() == [0, 333 / 999, 1, 0]


def test_random_times_are_those_of_a_network():
    flow, table = NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler()), NoisePath.from_scheduler(ddim())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([flow.draw(generator) for _ in range(1000)])
    assert ((drawn > 0) & (drawn <= 1)).all()
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 / 12**0.5 / 1000**0.5)
    whole = torch.cat([table.draw(generator) for _ in range(1000)])
    assert not whole.is_floating_point()
    assert 0 <= whole.min() <= whole.max() <= 999


def flow_path():
    """Times are sigmas: index t of the table of 1000 stands for (t + 1) / 1000."""
    path = NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler())
    return path, lambda t: (t + 1) / 1000, lambda t: (1 - (t + 1) / 1000, (t + 1) / 1000)


def ddim_path():
    squares = ddim().alphas_cumprod
    path = NoisePath.from_scheduler(ddim(prediction_type="sample"))
    return path, lambda t: t, lambda t: (squares[t].item() ** 0.5, (1 - squares[t].item()) ** 0.5)


@pytest.mark.parametrize("family", [flow_path, ddim_path])
@pytest.mark.parametrize(("t", "s"), [(999, 899), (700, 300), (40, 39), (1, 0)])
def test_eta_one_is_the_posterior_of_a_markov_chain(family, t, s):
    """Bayes: prior x_s | x_0 ~ N(a_s x_0, s_s²); likelihood x_t | x_s ~ N(c x_s, q), c = a_t / a_s, q = s_t² - c² s_s².

    The posterior precision is 1/s_s² + c²/q, the mean the precision-weighted one. It holds for any noise path.
    """
    path, time, coefficients = family()
    (a_t, s_t), (a_s, s_s) = coefficients(t), coefficients(s)
    x_0, e = random(1), random(2)
    x_t = a_t * x_0 + s_t * e
    c = a_t / a_s
    q = s_t**2 - (c * s_s) ** 2
    variance = 1 / (1 / s_s**2 + c**2 / q)
    mean = variance * (a_s * x_0 / s_s**2 + c * x_t / q)

    t, s = time(t), time(s)
    v = step_variance(EtaSchedule(eta=1.0), path, t, s, x_t)
    prediction = e - x_0 if path.prediction_type == "flow" else x_0
    gaussian = transition(path, x_t, prediction, t, s, v)

    assert_near(gaussian.variance, torch.full_like(gaussian.variance, variance))
    assert_near(gaussian.mean, mean, 1e-9)  # 1 - a² loses digits near t = 0


@pytest.mark.parametrize("family", [flow_path, ddim_path])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_marginals(family, eta):
    """Given the true (x_0, e), x_s has mean a_s x_0 and variance (coefficient of e)² + v = s_s²: any eta, same law."""
    path, time, coefficients = family()
    t, s = 600, 400
    (a_t, s_t), (a_s, s_s) = coefficients(t), coefficients(s)
    x_0 = random(1)
    t, s = time(t), time(s)

    def mean(e):
        x_t = a_t * x_0 + s_t * e
        prediction = e - x_0 if path.prediction_type == "flow" else x_0
        v = step_variance(EtaSchedule(eta=eta), path, t, s, x_t)
        return transition(path, x_t, prediction, t, s, v)

    zero, unit = mean(torch.zeros(SHAPE, dtype=torch.float64)), mean(torch.ones(SHAPE, dtype=torch.float64))
    assert_near(zero.mean, a_s * x_0)
    coefficient = unit.mean - zero.mean
    assert_near(coefficient**2 + unit.variance, torch.full(SHAPE, s_s**2, dtype=torch.float64))


# What is refused


@pytest.mark.parametrize("share", [-1e-3, 1.01, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_outside_the_path_is_an_error(share, dtype):
    path, x = NoisePath.from_scheduler(ddim()), random(0).to(dtype)
    v = share * path.at(400, x)[1] ** 2
    with pytest.raises(ValueError, match=r"a step variance of .* where the path allows 0 to sigma_s²"):
        transition(path, x, x, 500, 400, v)


def test_the_largest_variance_forgets_the_noise():
    path, x, x_0 = NoisePath.from_scheduler(ddim(prediction_type="sample")), random(0), random(1)
    alpha, sigma = path.at(400, x)
    assert_near(transition(path, x, x_0, 500, 400, sigma**2).mean, alpha * x_0)


def test_a_random_last_step_is_refused_where_alpha_ends_on_one():
    path, x = NoisePath.from_scheduler(ddim(set_alpha_to_one=True)), random(0)
    with pytest.raises(ValueError, match="a step variance"):
        transition(path, x, x, 20, FINAL, torch.full((1, 1, 1, 1), 1e-4))


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), DDPMScheduler(), ddim(thresholding=True), DDPMScheduler(clip_sample=False, thresholding=True)],
)
def test_schedulers_that_clip_are_refused(scheduler):
    with pytest.raises(ValueError, match=r"clip_sample True|thresholding True"):
        NoisePath.from_scheduler(scheduler)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), FlowMatchHeunDiscreteScheduler()])
def test_unknown_schedulers_are_refused_by_name(scheduler):
    with pytest.raises(ValueError, match=type(scheduler).__name__):
        NoisePath.from_scheduler(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "final"),
    [
        (PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True), "first"),
        (PNDMScheduler(**BETAS, set_alpha_to_one=True), "one"),
        (DDPMScheduler(**BETAS, clip_sample=False), "one"),
    ],
)
def test_ddpm_type_schedulers_keep_their_path_and_their_final_alpha(scheduler, final):
    path = NoisePath.from_scheduler(scheduler)
    squares = scheduler.alphas_cumprod.double()
    last = squares[:1] if final == "first" else torch.ones(1, dtype=torch.float64)
    assert_near(path.alpha**2, torch.cat([squares, last]), 1e-15)
    assert_near(path.alpha**2 + path.sigma**2, torch.ones(1001, dtype=torch.float64), 1e-15)
    assert path.steps(50)[-1] == (scheduler.config.get("steps_offset", 0), FINAL)


@pytest.mark.parametrize("scheduler", [LCMScheduler(), LCMScheduler(beta_end=0.015), EulerDiscreteScheduler(**BETAS)])
def test_a_converted_scheduler_keeps_the_defaults_of_its_own_class(scheduler):
    """LCM's default betas and Euler's default spacing are not DDIM's."""
    path = NoisePath.from_scheduler(scheduler)
    assert_near(path.alpha[:-1] ** 2, scheduler.alphas_cumprod.double(), 1e-15)
    assert path.scheduler.config.timestep_spacing == scheduler.config.timestep_spacing


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_converted_scheduler_keeps_its_prediction_type(prediction_type):
    path = NoisePath.from_scheduler(PNDMScheduler(**BETAS, prediction_type=prediction_type))
    x_0, e = random(1), random(2)
    alpha, sigma = path.at(300, x_0)
    prediction = e if prediction_type == "epsilon" else alpha * e - sigma * x_0
    clean, noise = path.clean_and_noise(alpha * x_0 + sigma * e, prediction, 300)
    assert_near(clean, x_0)
    assert_near(noise, e)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_a_count_of_steps_beyond_the_table_is_refused(count):
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        NoisePath.from_scheduler(ddim()).steps(count)


@pytest.mark.parametrize("count", [0, -1])
def test_a_flow_without_steps_is_refused(count):
    with pytest.raises(ValueError, match="expected 1 or more"):
        NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler()).steps(count)


def test_an_offset_that_leaves_the_table_is_refused():
    """1000 leading steps with offset 1 would start at time 1000, which is no time of a table of 1000."""
    path = NoisePath.from_scheduler(ddim(timestep_spacing="leading", steps_offset=1))
    with pytest.raises(ValueError, match="1000"):
        path.steps(1000)


def test_half_precision_latents_are_stepped_in_float32():
    """Held in float16, alpha_s x_0 + ... would be off by 1e-3; on the same rounded numbers float32 gives 1e-5."""
    path = NoisePath.from_scheduler(ddim())
    x_t, e = random(0).half(), random(1).half()
    half = transition(path, x_t, e, 500, 400, step_variance(EtaSchedule(eta=0.3), path, 500, 400, x_t.float()))
    wide = x_t.double()
    v = step_variance(EtaSchedule(eta=0.3), path, 500, 400, wide)
    assert half.mean.dtype == half.variance.dtype == torch.float32
    assert_near(half.mean.double(), transition(path, wide, e.double(), 500, 400, v).mean, 1e-5)
