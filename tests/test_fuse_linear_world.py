"""Whole fused runs in a world whose step-level optimum is known in closed form.

The data are x_0 ~ N(mu, C), so the exact denoiser E[x_0 | x_t] is affine and every step of every policy is a Gaussian
with an affine mean. Objective i has a step reward

    Q_i(x_s) = g_i · x_s - k_i |x_s - c_i|² / 2

and a policy p_i ∝ p_ref,i exp(Q_i / beta_i), with p_ref,i the base's transition under the objective's own eta. The
closed form is a matrix one, in information form: log p_i = -x_s' P x_s / 2 + x_s' (L x_t + h) + const, with

    P_i = I / v_i + k_i I / beta_i,    L_i = M_i / v_i,    h_i = b_i / v_i + (g_i + k_i c_i) / beta_i

where M_i x_t + b_i and v_i are the base's step as diffusers' DDIMScheduler takes it. A weighted sum of log densities is
the weighted sum of (P, L, h); completing the square gives the covariance P⁻¹ and the mean P⁻¹ (L x_t + h).
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.gaussian import Gaussian, product
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, step_variance

DIM, STEPS, DRAWS = 3, 10, 20_000
MU = np.array([1.0, -2.0, 0.5])
COVARIANCE = np.array([[1.0, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.5]])
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
WEIGHTS = np.array([0.5, 0.3, 0.2])


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Q(x) = slope · x - curvature |x - centre|² / 2, held at temperature beta on a base of this eta."""

    eta: float
    beta: float
    slope: tuple = (0.0, 0.0, 0.0)
    curvature: float = 0.0
    centre: tuple = (0.0, 0.0, 0.0)


LINEAR = (
    Reward(eta=0.5, beta=2.0, slope=(1.0, 0.0, -1.0)),
    Reward(eta=0.8, beta=0.5, slope=(0.0, 0.6, 0.2)),
    Reward(eta=1.0, beta=1.0, slope=(-0.5, 0.5, 1.0)),
)
QUADRATIC = (
    Reward(eta=0.5, beta=2.0, curvature=3.0, centre=(2.0, 0.0, -1.0)),
    Reward(eta=0.8, beta=0.5, curvature=0.7, centre=(-1.0, -1.0, 0.0), slope=(0.0, 0.3, 0.0)),
    Reward(eta=1.0, beta=1.0, slope=(-0.5, 0.5, 1.0)),
)
BASE = Reward(eta=0.9, beta=1.0)  # no reward: the reference policy, under an eta of its own
# With a final alpha of 1 the last step is deterministic; with the table's first one it is random.
ENDS = {
    "deterministic end": dict(set_alpha_to_one=True, steps_offset=0),
    "random end": dict(set_alpha_to_one=False, steps_offset=1),
}
WORLDS = [(rewards, strength, end) for rewards in (LINEAR, QUADRATIC) for strength in (1.0, 1.5) for end in ENDS]
NAMES = [f"{'linear' if w[0] is LINEAR else 'quadratic'}, strength {w[1]}, {w[2]}" for w in WORLDS]


def scheduler_of(end):
    """DDIM with its tables in float64: 1 - alpha² in float32 would cost more than the 1e-8 of these tests."""
    scheduler = DDIMScheduler(**BETAS, **ENDS[end])
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(STEPS)
    return scheduler


def exact_noise(x_t, square):
    """E[e | x_t] = (x_t - alpha E[x_0 | x_t]) / sigma, rows of x_t being points; square is alpha²."""
    alpha, sigma = square**0.5, (1 - square) ** 0.5
    gain = alpha * COVARIANCE @ np.linalg.inv(square * COVARIANCE + (1 - square) * np.eye(DIM))
    clean = MU + (x_t - alpha * MU) @ gain.T
    return (x_t - alpha * clean) / sigma


def affine(function):
    """(A, b) of an affine map of row vectors, from its values at 0 and at the basis vectors."""
    values = function(np.concatenate([np.zeros((1, DIM)), np.eye(DIM)]))
    return (values[1:] - values[0]).T, values[0]


# The closed form, without the code under test


def base_step(scheduler, t, eta):
    """M, b, v of the base's step: mean M x_t + b."""
    square = scheduler.alphas_cumprod[t].item()

    def mean(x):
        noise, zeros = torch.tensor(exact_noise(x, square)), torch.zeros(len(x), DIM)
        return scheduler.step(noise, t, torch.tensor(x), eta=eta, variance_noise=zeros).prev_sample.numpy()

    return *affine(mean), eta**2 * scheduler._get_variance(t, t - 1000 // STEPS).item()


def information(scheduler, t, reward):
    """(P, L, h) of an objective's optimal policy."""
    m, b, v = base_step(scheduler, t, reward.eta)
    k, centre, slope = reward.curvature, np.array(reward.centre), np.array(reward.slope)
    return np.eye(DIM) / v + k / reward.beta * np.eye(DIM), m / v, b / v + (slope + k * centre) / reward.beta


def complete_square(p, ell, h):
    """A, b, S of N(A x_t + b, S)."""
    covariance = np.linalg.inv(p)
    return covariance @ ell, covariance @ h, covariance


def optimal_step(scheduler, t, rewards, exponents):
    """A, b, S of Π p_i^(a_i)."""
    m, b, v = base_step(scheduler, t, rewards[0].eta)
    if v == 0:  # x_s is the base's x_0 for sure, and no reward can change that
        return m, b, np.zeros((DIM, DIM))
    parts = [information(scheduler, t, reward) for reward in rewards]
    return complete_square(*(sum(a * part[j] for a, part in zip(exponents, parts, strict=True)) for j in range(3)))


def optimal_run(rewards, exponents, end):
    """Mean and covariance of x_0 after all steps from x_T ~ N(0, I)."""
    scheduler = scheduler_of(end)
    mean, covariance = np.zeros(DIM), np.eye(DIM)
    for t in scheduler.timesteps.tolist():
        a, b, s = optimal_step(scheduler, t, rewards, exponents)
        mean, covariance = a @ mean + b, a @ covariance @ a.T + s
    return mean, covariance


# The same through the package


def ideal_prediction(path, scheduler, x_t, t, s, reward):
    """The noise and variance that a perfectly aligned network predicts.

    A noise e gives the mean alpha_s (x_t - sigma_t e) / alpha_t + sqrt(sigma_s² - v) e (DDIM, eq. 12), which is
    solved here for the e of the optimal policy's mean.
    """
    square_t = scheduler.alphas_cumprod[t].item()
    square_s = (scheduler.alphas_cumprod[s] if s >= 0 else scheduler.final_alpha_cumprod).item()
    if base_step(scheduler, t, reward.eta)[2] == 0:
        return exact_noise(x_t, square_t), 0.0
    a, b, covariance = complete_square(*information(scheduler, t, reward))
    v = covariance[0, 0]
    shrink = (square_s / square_t) ** 0.5
    target = x_t @ a.T + b
    return (target - shrink * x_t) / ((1 - square_s - v) ** 0.5 - shrink * (1 - square_t) ** 0.5), v


def fused_step(path, scheduler, x_t, t, s, rewards, exponents):
    gaussians, relative = [], []
    like = torch.tensor(x_t)
    for reward in rewards:
        e, v = ideal_prediction(path, scheduler, x_t, t, s, reward)
        schedule = EtaSchedule(eta=reward.eta)
        if reward.curvature == 0:  # a linear reward shifts the mean only: the variance is the schedule's own
            variance = step_variance(schedule, path, t, s, like)
            assert variance.item() == pytest.approx(v, rel=1e-9, abs=1e-18)
        else:
            variance = torch.tensor([[v]], dtype=torch.float64)
        gaussians.append(transition(path, like, torch.tensor(e), t, s, variance))
        relative.append(schedule.relative(path, t, s, like).item())
    columns = torch.tensor(exponents)[:, None].expand(-1, len(x_t))
    return product(gaussians, columns, relative_variances=torch.tensor(relative, dtype=torch.float64))


def policies(rewards, strength):
    """Rewards and exponents, the base among them where the strength leaves it an exponent."""
    if strength == 1:
        return rewards, WEIGHTS
    return (*rewards, BASE), np.append(strength * WEIGHTS, 1 - strength)


@pytest.mark.parametrize(("rewards", "strength", "end"), WORLDS, ids=NAMES)
def test_the_moments_of_a_fused_run_are_the_optimum(rewards, strength, end):
    rewards, exponents = policies(rewards, strength)
    expected_mean, expected_covariance = optimal_run(rewards, exponents, end)
    scheduler = scheduler_of(end)
    path = NoisePath.from_scheduler(scheduler_of(end))
    mean, covariance = np.zeros(DIM), np.eye(DIM)
    for t, s in path.steps(STEPS):
        variances = []

        def step_mean(x, t=t, s=s, variances=variances):
            gaussian = fused_step(path, scheduler, x, t, s, rewards, exponents)
            variances.append(gaussian.variance.unique().item())  # one number: the same at every x_t
            return gaussian.mean.numpy()

        a, b = affine(step_mean)
        mean, covariance = a @ mean + b, a @ covariance @ a.T + variances[0] * np.eye(DIM)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("rewards", "strength", "end"), WORLDS, ids=NAMES)
def test_the_draws_of_a_fused_run_have_the_moments_of_the_optimum(rewards, strength, end):
    rewards, exponents = policies(rewards, strength)
    mean, covariance = optimal_run(rewards, exponents, end)
    scheduler = scheduler_of(end)
    path = NoisePath.from_scheduler(scheduler_of(end))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(DRAWS, DIM, generator=generator, dtype=torch.float64)
    for t, s in path.steps(STEPS):
        x = fused_step(path, scheduler, x.numpy(), t, s, rewards, exponents).sample(generator)
    x = x.numpy()
    # Standard errors for a Gaussian: sqrt(S_ii / n) of a mean, sqrt((S_ii S_jj + S_ij²) / n) of a covariance.
    variances = np.diag(covariance)
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(variances / DRAWS)).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / DRAWS)
    assert (np.abs(np.cov(x.T) - covariance) < 5 * error).all()


@pytest.mark.parametrize("end", ENDS)
def test_the_fused_run_is_not_the_base_nor_the_average_of_the_objectives(end):
    """The worlds above can tell methods apart: the optimum is far, in sampling errors, from the obvious mistakes."""
    mean, covariance = optimal_run(LINEAR, WEIGHTS, end)
    error = 5 * np.sqrt(np.diag(covariance) / DRAWS)
    alone = [optimal_run([reward], [1.0], end)[0] for reward in LINEAR]
    for other in (optimal_run([BASE], [1.0], end)[0], WEIGHTS @ np.array(alone)):
        assert (np.abs(mean - other) > 5 * error).any()


def test_the_base_alone_reproduces_the_data():
    """Ancestral sampling (eta 1) with the exact denoiser: in 1000 steps the run ends near N(mu, C) itself."""
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    path = NoisePath.from_scheduler(scheduler)
    mean, covariance = np.zeros(DIM), np.eye(DIM)
    for t, s in path.steps(1000):
        square = scheduler.alphas_cumprod[t].item()
        x = np.concatenate([np.zeros((1, DIM)), np.eye(DIM)])
        like = torch.tensor(x)
        v = step_variance(EtaSchedule(eta=1.0), path, t, s, like)
        gaussian = transition(path, like, torch.tensor(exact_noise(x, square)), t, s, v)
        a, b = (gaussian.mean[1:] - gaussian.mean[0]).T.numpy(), gaussian.mean[0].numpy()
        mean, covariance = a @ mean + b, a @ covariance @ a.T + v.item() * np.eye(DIM)
    # x_T is drawn from N(0, I) where the path has alpha_T = 0.07, and steps are finite: a percent or so.
    np.testing.assert_allclose(mean, MU, atol=0.02)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.02)


# Why the product is what a user of several rewards wants


def expected_reward(reward, mean, variance):
    """E[Q(x)], x ~ N(mean, variance I): E|x - c|² = |mean - c|² + D variance."""
    slope, centre = torch.tensor(reward.slope), torch.tensor(reward.centre)
    spread = ((mean - centre) ** 2).sum() + DIM * variance
    return (slope * mean).sum() - reward.curvature * spread / 2


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.2, 0.1, 0.4)])
@pytest.mark.parametrize("beta", [0.6, 1.0, 3.0])
def test_the_product_maximises_the_weighted_rewards_under_a_kl_penalty(weights, beta):
    """On one reference, a_i = w_i beta_i / beta and 1 - Σ a_i give the maximum of E[Σ w_i Q_i] - beta KL(p ‖ p_ref).

    There the gradient in mean and log-variance vanishes, and any move lowers the objective, which is strictly concave
    around it. KL is torch's.
    """
    reference = Gaussian(
        mean=torch.tensor([[0.4, -1.0, 2.0]], dtype=torch.float64),
        variance=torch.tensor([[0.3]], dtype=torch.float64),
    )
    aligned, exponents = [], []
    for w, reward in zip(weights, QUADRATIC, strict=True):
        # p_ref exp(Q / beta_i), the square completed by hand
        precision = 1 / 0.3 + reward.curvature / reward.beta
        drift = torch.tensor(reward.slope) + reward.curvature * torch.tensor(reward.centre)
        mean = (reference.mean / 0.3 + drift / reward.beta) / precision
        aligned.append(Gaussian(mean=mean, variance=torch.full((1, 1), 1 / precision, dtype=torch.float64)))
        exponents.append(w * reward.beta / beta)
    fused = product([*aligned, reference], torch.tensor([*exponents, 1 - sum(exponents)], dtype=torch.float64))

    def objective(mean, log_variance):
        p = torch.distributions.Normal(mean, (log_variance / 2).exp())
        q = torch.distributions.Normal(reference.mean[0], torch.tensor(0.3, dtype=torch.float64).sqrt())
        gain = sum(
            w * expected_reward(reward, mean, log_variance.exp()) for w, reward in zip(weights, QUADRATIC, strict=True)
        )
        return gain - beta * torch.distributions.kl_divergence(p, q).sum()

    mean = fused.mean[0].clone().requires_grad_()
    log_variance = fused.variance[0, 0].log().clone().requires_grad_()
    best = objective(mean, log_variance)
    best.backward()
    torch.testing.assert_close(mean.grad, torch.zeros(DIM, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_variance.grad, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-6)
    for k in range(DIM):
        for move in (-0.05, 0.05):
            assert objective(mean.detach() + move * torch.eye(DIM)[k], log_variance.detach()) < best
    for move in (-0.05, 0.05):
        assert objective(mean.detach(), log_variance.detach() + move) < best
