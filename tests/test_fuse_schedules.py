"""Variance schedules of other samplers, share of sigma_s² and exact SDE step, against their formulas."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepfuse.fuse.diffusion.gaussian import product
from stepfuse.fuse.diffusion.noise_path import FINAL, NoisePath
from stepfuse.fuse.diffusion.sde import SDESchedule
from stepfuse.fuse.diffusion.share import ShareSchedule
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, correlation, step_variance
from stepfuse.fuse.rules.schedules import initial_schedule, schedule_from_dict, schedule_to_dict
from tests.fixtures_tiny import ddim, refused

PATHS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "leading": ddim,
    "ends on alpha 1": lambda: ddim(set_alpha_to_one=True),
}
CPS = ShareSchedule(share=math.sin(0.7 * math.pi / 2) ** 2)
SDE = SDESchedule(noise_level=0.7)


def path_of(name):
    return NoisePath.from_scheduler(PATHS[name]())


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coefficients(path, schedule, t, s):
    """(the coefficient of x_0, that of e, and v) of steps at one time or several, of transitions at unit vectors."""
    zero = torch.zeros(len(torch.as_tensor(t).reshape(-1)), 1, dtype=torch.float64)
    v = step_variance(schedule, path, t, s, zero)
    means = []
    for x_0, e in ((zero + 1, zero), (zero, zero + 1)):
        means.append(transition(path, path.noised(x_0, e, t), path.target(x_0, e, t), t, s, v).mean)
    return tuple(torch.broadcast_to(value, zero.shape).flatten().tolist() for value in (*means, v))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("schedule", [CPS, SDE, ShareSchedule(share=1.0), SDESchedule(noise_level=5.0)])
@pytest.mark.parametrize("count", [4, 40])
def test_a_step_keeps_the_noise_level_of_the_path(name, schedule, count):
    """x_s has the coefficients of the path: alpha_s of x_0, and c² + v = sigma_s²."""
    path = path_of(name)
    for t, s in path.steps(count):
        alpha, sigma = (value.item() for value in path.at(s, torch.zeros(1, dtype=torch.float64)))
        ((x_0,), (c,), (v,)) = coefficients(path, schedule, t, s)
        assert x_0 == pytest.approx(alpha, rel=1e-9)
        assert c**2 + v == pytest.approx(sigma**2, rel=1e-9, abs=1e-15)
        assert v > 0 or sigma == 0


@pytest.mark.parametrize("count", [1, 4, 40])
def test_cps_is_its_formula_written_out(count):
    """x_s = (1 - s) x_0 + s cos(a π / 2) e + s sin(a π / 2) n, for the x_0 and e of a velocity (arXiv:2509.05952)."""
    path, a, x, velocity = path_of("flow"), 0.7, random(0, 3, 4), random(1, 3, 4)
    assert CPS.share == pytest.approx(0.794, abs=5e-4)
    assert math.sin(0.8 * math.pi / 2) ** 2 == pytest.approx(0.905, abs=5e-4)
    for t, s in path.steps(count):
        x_0, e = x - t * velocity, x + (1 - t) * velocity
        step = transition(path, x, velocity, t, s, step_variance(CPS, path, t, s, x))
        torch.testing.assert_close(step.mean, (1 - s) * x_0 + s * math.cos(a * math.pi / 2) * e, rtol=0, atol=1e-12)
        assert step.variance.sqrt().item() == pytest.approx(s * math.sin(a * math.pi / 2), rel=1e-12)


def test_the_relative_variance_of_cps_goes_beyond_1_in_short_steps():
    """r = share / (1 - rho²); share where s is 0 and at t = 1."""
    path, like = path_of("flow"), torch.zeros(1, 1, dtype=torch.float64)
    found = [CPS.relative(path, t, s, like).item() for t, s in path.steps(10)]
    by_hand = [CPS.share / (1 - (s * (1 - t) / (t * (1 - s))) ** 2) for t, s in path.steps(10)]
    assert found == pytest.approx(by_hand, rel=1e-12)
    assert (found[0], found[-1]) == pytest.approx((CPS.share, CPS.share))
    assert max(found) > 1.4


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("count", [1, 7, 50])
def test_noise_level_root_2_is_eta_1(name, count):
    path, like = path_of(name), torch.zeros(1, 1, dtype=torch.float64)
    for t, s in path.steps(count):
        exact = step_variance(SDESchedule(noise_level=math.sqrt(2)), path, t, s, like)
        torch.testing.assert_close(exact, step_variance(EtaSchedule(eta=1.0), path, t, s, like), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["flow", "leading"])
def test_to_leading_order_eta_is_the_noise_level_over_root_2(name):
    """With rho = 1 - d, r = a² / 2 · (1 + (2 - a²) / 2 · d + …), which tends to a² / 2 with the length of the step."""
    path, like, a = path_of(name), torch.zeros(1, 1, dtype=torch.float64), 0.7
    errors = []
    for count in (50, 500):
        t, s = path.steps(count)[count // 2]
        d = 1 - correlation(path, t, s, like).item()
        errors.append(SDE.relative(path, t, s, like).item() / (a**2 / 2) - 1)
        assert errors[-1] == pytest.approx((2 - a**2) / 2 * d, rel=2 * d)
    assert 0.1 > errors[0] > 5 * errors[1] > 0


def test_the_exact_step_is_the_sde_in_many_small_steps():
    """dn = (1 / t + g² / (2 t²)) n dt + g dW of the noise n = x - (1 - t) x_0, from .8 to .3, by Euler-Maruyama."""
    (t, s), a, count = (0.8, 0.3), 0.7, 20_000
    times = np.linspace(t, s, count + 1)
    slope, variance = 1.0, 0.0
    for before, after in pairwise(times):
        g2, h = a**2 * before / (1 - before), before - after
        factor = 1 - h / before - h * g2 / (2 * before**2)
        slope, variance = factor * slope, factor**2 * variance + g2 * h
    _, (c,), (v,) = coefficients(path_of("flow"), SDE, t, s)
    assert v == pytest.approx(variance, rel=1e-3)
    assert c == pytest.approx(slope * t, rel=1e-3)


@pytest.mark.parametrize("schedule", [SDESchedule(noise_level=1e-5), ShareSchedule(share=1e-10)])
def test_with_next_to_no_noise_a_step_is_that_of_the_euler_ode(schedule):
    """Of the SDE at every t below 1, where its noise is infinite for any noise level above 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    path = NoisePath.from_scheduler(scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    x = random(0, 2, 5).float()
    for (t, s), timestep in zip(path.steps(8), scheduler.timesteps, strict=True):
        velocity = torch.sin(x + t)
        expected = scheduler.step(velocity, timestep, x).prev_sample
        step = transition(path, x, velocity, t, s, step_variance(schedule, path, t, s, x))
        if t < 1 or schedule.field_names() == ["share"]:
            torch.testing.assert_close(step.mean, expected, rtol=1e-5, atol=1e-5)
            assert step.variance.max() < 1e-9
        else:
            assert step.variance.item() == pytest.approx(s**2, rel=1e-6)
        x = expected


def test_a_step_between_equal_noise_levels_has_no_noise():
    """The last step of a DDIM that ends on its first alpha: ancestral variance 0, and r a number nevertheless."""
    path, like = NoisePath.from_scheduler(ddim(steps_offset=0)), torch.zeros(1, 1, dtype=torch.float64)
    t, s = path.steps(10)[-1]
    assert (t, s) == (0, FINAL)
    for schedule, r in ((CPS, CPS.share), (SDE, 0.7**2 / 2)):
        assert schedule.relative(path, t, s, like).item() == pytest.approx(r)
        assert step_variance(schedule, path, t, s, like).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("schedule", [CPS, SDE, ShareSchedule(share=1.0)])
def test_a_step_of_hundreds_is_one_in_float32_and_half_precision_too(schedule, dtype):
    path, x = path_of("flow"), random(0, 1, 2).to(dtype)
    for t, s in path.steps(400):
        v = step_variance(schedule, path, t, s, x)
        assert v.dtype == torch.float32
        wide = step_variance(schedule, path, t, s, x.double())
        torch.testing.assert_close(v.double(), wide, rtol=1e-6, atol=0)
        transition(path, x, x, t, s, v)  # which checks its variance


def samples_deviation(schedule, count):
    """Standard deviation of samples, over that of their data N(0, .5²), where E[x_0 | x_t] is exact."""
    path, deviation, variance = path_of("flow"), 0.5, 1.0
    starts, ends = torch.tensor(path.steps(count), dtype=torch.float64).T
    steps = zip(starts.tolist(), *coefficients(path, schedule, starts, ends), strict=True)
    for t, x_0, c, v in steps:
        best = (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)  # of x_0, in units of x_t
        variance = (x_0 * best + c * (1 - (1 - t) * best) / t) ** 2 * variance + v
    return variance**0.5 / deviation


def test_many_steps_of_cps_do_not_reach_the_distribution_of_the_data_and_others_do():
    assert samples_deviation(CPS, 640) == pytest.approx(0.843, abs=1e-3)
    assert samples_deviation(EtaSchedule(eta=0.7 / 2**0.5), 640) == pytest.approx(0.994, abs=1e-3)
    assert samples_deviation(SDE, 640) == pytest.approx(0.994, abs=1e-3)
    assert samples_deviation(EtaSchedule(eta=0.0), 640) == pytest.approx(0.995, abs=1e-3)


def test_the_product_of_a_cps_and_an_sde_policy_is_their_integrated_product():
    """p* ∝ p_cps^.6 p_sde^.7 p_ref^-.3 at one step of a flow, in one dimension, by the trapezoid rule."""
    path, x_t = path_of("flow"), torch.tensor([[0.3]], dtype=torch.float64)
    t, s = path.steps(10)[6]
    schedules, velocities, exponents = (CPS, SDE, EtaSchedule(eta=0.8)), (1.2, -0.4, 0.1), (0.6, 0.7, -0.3)
    experts = [
        transition(path, x_t, torch.full_like(x_t, u), t, s, step_variance(schedule, path, t, s, x_t))
        for u, schedule in zip(velocities, schedules, strict=True)
    ]
    fused = product(experts, torch.tensor(exponents, dtype=torch.float64))
    x, log_density = np.linspace(-8, 8, 20_001), 0.0
    for expert, a in zip(experts, exponents, strict=True):
        m, v = expert.mean.item(), expert.variance.item()
        log_density = log_density + a * (-((x - m) ** 2) / (2 * v) - 0.5 * math.log(2 * math.pi * v))
    density = np.exp(log_density - log_density.max())
    density /= np.trapezoid(density, x)
    mean = np.trapezoid(density * x, x)
    assert fused.mean.item() == pytest.approx(mean, rel=1e-9)
    assert fused.variance.item() == pytest.approx(np.trapezoid(density * (x - mean) ** 2, x), rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (ShareSchedule(share=0.794), {"kind": "share", "share": 0.794}),
        (SDESchedule(noise_level=0.7), {"kind": "sde", "noise_level": 0.7}),
    ],
)
def test_these_schedules_survive_json(schedule, values):
    assert schedule_to_dict(schedule) == values
    assert schedule_from_dict(json.loads(json.dumps(values))) == schedule


@pytest.mark.parametrize(
    ("values", "culprits"),
    [
        ({"kind": "share", "share": 1.2}, ["share is 1.2", "[0, 1]"]),
        ({"kind": "share", "share": math.nan}, ["share is nan"]),
        ({"kind": "share", "share": "much"}, ["share is 'much'"]),
        ({"kind": "share"}, ["share"]),
        ({"kind": "sde", "noise_level": -0.1}, ["noise_level is -0.1", "0 or more"]),
        ({"kind": "sde", "noise_level": math.inf}, ["noise_level is inf", "finite"]),
        ({"kind": "sde", "noise": 0.7}, ["'noise'", "did you mean 'noise_level'?"]),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_that_make_no_schedule_are_refused_in_one_line(values, culprits):
    with refused(*culprits):
        schedule_from_dict(values)


@pytest.mark.parametrize(
    ("kind", "options", "culprits"),
    [
        ("share", {"share": 0.0}, ["share is 0.0", "no log-probability"]),
        ("share", {}, ["share", "CPS of noise level a"]),
        ("sde", {"noise_level": 0}, ["noise_level is 0", "no log-probability"]),
        ("sde", {"share": 0.7}, ["'share'", "expected noise_level for variance sde"]),
    ],
)
def test_what_cannot_be_trained_with_is_refused_in_one_line(kind, options, culprits):
    with refused(*culprits):
        initial_schedule(kind, {}, options)


def test_a_path_of_the_stable_diffusion_kind_takes_both():
    path, like = NoisePath.from_scheduler(DDIMScheduler(clip_sample=False)), torch.zeros(1, 1, dtype=torch.float64)
    squares = path.scheduler.alphas_cumprod.double()
    rho = (squares[700] * (1 - squares[600]) / (squares[600] * (1 - squares[700]))).sqrt()
    v = step_variance(SDE, path, 700, 600, like)
    assert v.item() == pytest.approx(((1 - squares[600]) * (1 - rho**0.49)).item(), rel=1e-9)
    v = step_variance(CPS, path, 700, 600, like)
    assert v.item() == pytest.approx((CPS.share * (1 - squares[600])).item(), rel=1e-9)
