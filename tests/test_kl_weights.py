"""The weights of denoising steps in the KL of a flow, and the warning of one that outweighs the others."""

import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.kl_weights import kl_weights
from stepfuse.fuse.diffusion.noise_path import FlowPath, NoisePath
from stepfuse.fuse.diffusion.share import ShareSchedule
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import EtaSchedule, step_variance
from tests.fixtures_tiny import ddim
from tests.fixtures_words import save_words

REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"
ANCESTRAL = EtaSchedule(eta=1.0)


def default_grid(count):
    """The steps that Stable Diffusion 3's scheduler takes when it is told their number alone."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(count)
    sigmas = scheduler.sigmas.tolist()
    return NoisePath.from_scheduler(scheduler), list(pairwise(sigmas))


def even_grid(count, **scheduler):
    path = NoisePath.from_scheduler(FlowMatchEulerDiscreteScheduler(**scheduler))
    return path, path.steps(count)


def qwen_grid(count):
    """Qwen-Image at 1024 pixels: 4096 tokens, of which its mu is 0.5 + (4096 - 256) / (8192 - 256) (0.9 - 0.5)."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    path = FlowPath(scheduler=scheduler, mu=0.5 + (4096 - 256) / (8192 - 256) * (0.9 - 0.5))
    return path, path.steps(count)


@pytest.mark.parametrize(
    ("grid", "total", "share"),
    [
        (default_grid(10), 477, 1.00),
        (default_grid(28), 77, 0.97),
        (qwen_grid(20), 17, 0.89),
        (even_grid(10, shift=3.0), 1.0, 0.66),
        (even_grid(28, shift=3.0), 2.2, 0.50),
    ],
)
def test_one_step_of_a_grid_that_ends_near_0_carries_the_whole_kl(grid, total, share):
    weights = kl_weights(*grid, ANCESTRAL)
    assert weights.sum().item() == pytest.approx(total, rel=0.03)
    assert (weights.max() / weights.sum()).item() == pytest.approx(share, abs=0.006)
    assert weights[-1] == 0  # no noise


@pytest.mark.parametrize("schedule", [ANCESTRAL, ShareSchedule(share=0.794)])
@pytest.mark.parametrize("path", [even_grid(1, shift=3.0)[0], NoisePath.from_scheduler(ddim())])
def test_weights_are_the_kl_of_predictions_that_differ_by_1(path, schedule):
    x, u = (torch.randn(1, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    steps = path.steps(10)
    for (t, s), weight in zip(steps[:-1], kl_weights(path, steps, schedule)[:-1], strict=True):
        v = step_variance(schedule, path, t, s, x)
        first, second = (transition(path, x, prediction, t, s, v) for prediction in (u, u + 1))
        assert first.kl(second).item() == pytest.approx(weight.item(), rel=1e-9)


def test_the_weight_of_a_flow_step_written_out():
    """At t = .5, s = .25 and eta 1: rho = 1/3, v = 8/9 · 1/16 = 1/18, and c = s rho = 1/12."""
    path, _ = even_grid(1)
    (weight,) = kl_weights(path, [(0.5, 0.25)], ANCESTRAL).tolist()
    assert weight == pytest.approx((1 / 12 * 0.5 - 0.75 * 0.5) ** 2 / (2 / 18))


def test_the_log_ratio_of_two_policies_has_twice_the_weight_as_variance():
    path, _ = even_grid(1)
    (weight,) = kl_weights(path, [(0.5, 0.25)], ANCESTRAL).tolist()
    v = torch.full((1, 1), 1 / 18, dtype=torch.float64)
    slope = math.sqrt(weight * 2 / 18)
    p, q = (Gaussian(mean=torch.full((1, 1), m, dtype=torch.float64), variance=v) for m in (0.0, slope))
    x = v.sqrt() * torch.from_numpy(np.random.default_rng(0).standard_normal((20_000, 1)))
    assert (p.log_prob(x) - q.log_prob(x)).var().item() == pytest.approx(2 * weight, rel=0.04)


# The warning at the start of a run


def warnings_of(run_training, caplog, base, **flags):
    with caplog.at_level(logging.WARNING):
        run_training("ddpo", pretrained_model_name_or_path=base, max_train_steps=1, overwrite="true", **flags)
    found = [record.getMessage() for record in caplog.records if "KL weights" in record.getMessage()]
    caplog.clear()
    return found


def test_a_step_that_outweighs_the_others_is_warned_of_until_it_is_skipped(words, run_training, caplog, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=2.0, shift_terminal=0.005)
    near_0 = save_words(tmp_path / "near-0", scheduler)
    (line,) = warnings_of(run_training, caplog, near_0, sample_num_steps=4)
    assert "denoising step 3 of 4" in line
    assert "0.005) carries 100 %" in line
    assert "--skip_last_steps 2" in line
    assert "\n" not in line
    assert warnings_of(run_training, caplog, near_0, sample_num_steps=4, skip_last_steps=2) == []
    assert warnings_of(run_training, caplog, near_0, sample_num_steps=4, skip_first_steps=1) == []  # one would be left
    assert warnings_of(run_training, caplog, words, sample_num_steps=4) == []
