"""Bounds of training's settings that are not those of one number."""

import math

import pytest
from diffusers.optimization import SchedulerType

from stepfuse.train.policy_settings import LR_SCHEDULERS
from stepfuse.train.settings import DDPOSettings


def test_learning_rate_schedulers_are_those_of_diffusers_that_need_no_list_of_steps():
    assert set(LR_SCHEDULERS) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}


def test_limits_are_switched_off_by_infinity_and_other_numbers_are_finite():
    limits = dict.fromkeys(("train_adv_clip_max", "max_grad_norm", "train_clip_range", "max_kl"), math.inf)
    settings = DDPOSettings(prompts="emoji", reward="compressibility", **limits)
    assert [getattr(settings, name) for name in limits] == [math.inf] * 4
    for name in ("learning_rate", "beta", "sample_guidance_scale"):
        with pytest.raises(ValueError, match=f"{name} is inf"):
            DDPOSettings(prompts="emoji", reward="compressibility", **{name: math.inf})
