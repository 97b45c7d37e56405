"""Losses of DPO and DDPO, against arithmetic on log-probabilities worked here."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.nn import functional

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.train.algorithms import DDPO, DPO
from stepfuse.train.losses import ddpo_loss, dpo_loss
from stepfuse.train.rollout import PairedStep, SampledStep
from stepfuse.train.settings import DDPOSettings, DPOSettings

D = 2 * 3 * 4  # dimension of the latents below
V = 0.5


def latents(seed, batch=5):
    return torch.randn(batch, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def log_density(mean, variance, x):
    return Independent(Normal(mean.double(), math.sqrt(variance)), 3).log_prob(x.double())


POLICY, REFERENCE, CHOSEN, REJECTED = (latents(seed) for seed in range(4))
H = (
    log_density(POLICY, V, CHOSEN)
    - log_density(REFERENCE, V, CHOSEN)
    - log_density(POLICY, V, REJECTED)
    + log_density(REFERENCE, V, REJECTED)
)


def gaussian(mean, variance=V):
    return Gaussian(mean=mean, variance=torch.full((len(mean), 1, 1, 1), variance))


def paired(kept=None):
    return PairedStep(
        index=0,
        x_t=latents(4),
        t=500,
        s=400,
        weights=torch.ones(len(CHOSEN), 1),
        negative=None,
        reference=latents(5),
        chosen=CHOSEN,
        rejected=REJECTED,
        kept=torch.ones(len(CHOSEN), dtype=torch.bool) if kept is None else kept,
    )


# DPO on log-probabilities


def test_dpo_loss_of_the_reference_itself_is_log_2():
    chosen, rejected = torch.tensor([-3.25, 1e4]), torch.tensor([7.5, -1e4])
    loss = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), beta=3.0)
    assert loss.tolist() == [torch.tensor(math.log(2)).item()] * 2


def test_dpo_loss_of_one_pair_worked_by_hand():
    # h = (-1 - -1.5) - (-3 - -2) = 0.5 + 1 = 1.5, and βh = 3
    logs = [torch.tensor([value]) for value in (-1.0, -3.0, -1.5, -2.0)]
    assert dpo_loss(*logs, beta=2.0).item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-6)
    smooth = 0.9 * math.log(1 + math.exp(-3)) + 0.1 * math.log(1 + math.exp(3))
    assert dpo_loss(*logs, beta=2.0, label_smoothing=0.1).item() == pytest.approx(smooth, rel=1e-6)
    assert dpo_loss(*logs, beta=2.0, loss_type="ipo").item() == (1.5 - 1 / 4) ** 2


@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_loss_is_the_cross_entropy_of_smoothed_labels(beta, smoothing):
    logs = [5 * torch.randn(50, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    h = logs[0] - logs[2] - logs[1] + logs[3]
    target = torch.full_like(h, 1 - smoothing)
    expected = functional.binary_cross_entropy_with_logits(beta * h, target, reduction="none")
    torch.testing.assert_close(dpo_loss(*logs, beta=beta, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("h", [-2.0, 0.0, 1.5])
def test_gradient_of_dpo_is_beta_times_the_probability_of_error(h):
    beta = 0.7
    chosen, rejected = torch.tensor([h], requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=beta).sum().backward()
    error = 1 / (1 + math.exp(beta * h))
    assert chosen.grad.item() == pytest.approx(-beta * error, rel=1e-6)
    assert rejected.grad.item() == pytest.approx(beta * error, rel=1e-6)


def test_dpo_loss_of_a_wrong_pair_grows_linearly_without_overflow():
    loss = dpo_loss(torch.tensor([-1e6]), torch.tensor([0.0]), torch.zeros(1), torch.zeros(1), beta=1.0)
    assert loss.item() == 1e6


# SPO's clamp

CLAMPED = [  # log-ratios of winner and loser, and those that are left of them with ε = 0.1
    (0.05, -0.02, 0.05, -0.02),
    (0.5, -0.02, math.log(1.1), -0.02),
    (0.05, -0.5, 0.05, math.log(0.9)),
    (-0.5, 0.5, math.log(0.9), math.log(1.1)),
]


@pytest.mark.parametrize(("winner", "loser", "winner_left", "loser_left"), CLAMPED)
def test_each_ratio_is_clamped_by_itself_and_then_has_no_gradient(winner, loser, winner_left, loser_left):
    beta = 10.0
    logs = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (winner - 3, loser + 2)]
    reference = [torch.tensor([value], dtype=torch.float64) for value in (-3.0, 2.0)]
    loss = dpo_loss(*logs, *reference, beta=beta, clip_range=0.1)
    loss.sum().backward()
    h = winner_left - loser_left
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-beta * h)), rel=1e-9)
    slope = beta / (1 + math.exp(beta * h))
    assert logs[0].grad.item() == pytest.approx(-slope if winner == winner_left else 0.0, rel=1e-9)
    assert logs[1].grad.item() == pytest.approx(slope if loser == loser_left else 0.0, rel=1e-9)


def test_clamped_loss_is_that_of_spo_without_overflow():
    # The arithmetic of train_spo.py: clamp(exp(log p - log p_ref), 1 - eps, 1 + eps), and then its logarithm.
    logs = [torch.randn(200, generator=torch.Generator().manual_seed(i), dtype=torch.float64) / 5 for i in range(4)]
    ratios = [torch.clamp(torch.exp(logs[i] - logs[i + 2]), 1 - 0.1, 1 + 0.1) for i in range(2)]
    expected = -torch.log(torch.sigmoid(10.0 * torch.log(ratios[0]) - 10.0 * torch.log(ratios[1])))
    torch.testing.assert_close(dpo_loss(*logs, beta=10.0, clip_range=0.1), expected)
    far = [torch.tensor([value]) for value in (1e4, -1e4, 0.0, 0.0)]
    assert dpo_loss(*far, beta=10.0, clip_range=0.1).item() == pytest.approx(
        math.log(1 + math.exp(-10 * (math.log(1.1) - math.log(0.9)))), rel=1e-6
    )


def test_clamp_of_the_settings_reaches_the_loss_and_is_off_by_default():
    step, policy, reference = paired(), gaussian(POLICY), gaussian(REFERENCE)
    plain = DPO(DPOSettings(beta=10.0, log_prob_reduction="mean")).loss(policy, reference, step)
    clamped = DPO(DPOSettings(beta=10.0, log_prob_reduction="mean", train_clip_range=0.1)).loss(policy, reference, step)
    ratios = [
        (log_density(POLICY, V, x) - log_density(REFERENCE, V, x)).div(D).exp().clamp(0.9, 1.1).log()
        for x in (CHOSEN, REJECTED)
    ]
    torch.testing.assert_close(
        clamped.double(), -functional.logsigmoid(10 * (ratios[0] - ratios[1])), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(plain.double(), -functional.logsigmoid(10 * H / D), rtol=1e-4, atol=1e-5)
    assert (clamped != plain).any()


@pytest.mark.parametrize(
    "wrong", [dict(train_clip_range=1.0), dict(train_clip_range=-0.1), dict(train_clip_range=0.1, pairs="x")]
)
def test_clamp_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="train_clip_range"):
        DPOSettings(**wrong)


# DDPO on log-probabilities


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [  # L = max(-A ρ, -A clip(ρ, 0.8, 1.2)); its slope in log ρ is -A ρ, or 0 where the clipped one is larger
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_ddpo_loss_and_slope_on_both_sides_of_the_clip(ratio, advantage, expected, slope):
    old = torch.tensor([-7.0], dtype=torch.float64)
    log_prob = (old + math.log(ratio)).requires_grad_()
    loss = ddpo_loss(log_prob, old, torch.tensor([advantage], dtype=torch.float64), clip_range=0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert log_prob.grad.item() == pytest.approx(slope, abs=1e-12)


# Both on Gaussians of latents


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_dpo_compares_densities_or_their_mean_over_dimensions(loss_type, reduction):
    beta = 0.3 if reduction == "sum" else 0.3 * D
    settings = DPOSettings(beta=beta, log_prob_reduction=reduction, loss_type=loss_type)
    h = H if reduction == "sum" else H / D
    expected = -functional.logsigmoid(beta * h) if loss_type == "sigmoid" else (h - 1 / (2 * beta)) ** 2
    values = DPO(settings).loss(gaussian(POLICY), gaussian(REFERENCE), paired())
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)


def test_label_smoothing_reaches_the_loss():
    settings = DPOSettings(beta=0.1, label_smoothing=0.25)
    expected = -0.75 * functional.logsigmoid(0.1 * H) - 0.25 * functional.logsigmoid(-0.1 * H)
    values = DPO(settings).loss(gaussian(POLICY), gaussian(REFERENCE), paired())
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_dropped_pair_has_no_loss_and_no_gradient():
    mean = POLICY.clone().requires_grad_()
    kept = torch.tensor([True, False, True, False, False])
    values = DPO(DPOSettings(beta=0.1)).loss(gaussian(mean), gaussian(REFERENCE), paired(kept))
    values.sum().backward()
    assert (values[~kept] == 0).all()
    assert (mean.grad[~kept] == 0).all()
    # ∂L/∂m = -β σ(-βh) [(x_w - m) - (x_l - m)] / v
    expected = -0.1 * torch.sigmoid(-0.1 * H).reshape(-1, 1, 1, 1) * (CHOSEN - REJECTED) / V
    torch.testing.assert_close(mean.grad[kept].double(), expected[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ddpo_ratio_is_of_densities_or_of_their_mean_over_dimensions(reduction):
    x = CHOSEN
    near = POLICY + 0.01 * REFERENCE
    old, new = log_density(POLICY, V, x), log_density(near, V, x)
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0])
    step = SampledStep(
        index=0,
        x_t=latents(4),
        t=500,
        s=400,
        weights=torch.ones(len(x), 1),
        negative=None,
        reference=REFERENCE,
        x_s=x,
        log_prob=old,
        advantage=advantage,
    )
    settings = DDPOSettings(train_clip_range=10.0, log_prob_reduction=reduction)
    values = DDPO(settings).loss(gaussian(near), gaussian(REFERENCE), step)
    expected = -advantage * ((new - old) / (1 if reduction == "sum" else D)).exp()
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)


# The temperature of what a loss has for its optimum


def test_the_stored_beta_is_that_of_the_density_whatever_the_reduction():
    # D = 64: DPO's mean loss has beta / D before the sum of log-ratios; DDPO's gradient is divided by D, its KL is not.
    dpo, ddpo = (dict(beta=0.5, log_prob_reduction=kind) for kind in ("sum", "mean"))
    assert [DPO(DPOSettings(**values)).temperature(0.5, 64) for values in (dpo, ddpo)] == [0.5, 0.5 / 64]
    assert [DDPO(DDPOSettings(**values)).temperature(0.5, 64) for values in (dpo, ddpo)] == [0.5, 32.0]


def test_dpo_by_means_is_dpo_by_sums_at_its_temperature():
    generator = torch.Generator().manual_seed(0)
    log_probs = [torch.randn(8, generator=generator) for _ in range(4)]
    mean = dpo_loss(*(value / 64 for value in log_probs), beta=0.5)
    torch.testing.assert_close(
        mean, dpo_loss(*log_probs, beta=DPO(DPOSettings(beta=0.5, log_prob_reduction="mean")).temperature(0.5, 64))
    )
