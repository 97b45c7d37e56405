"""Training on a flow path through its commands, on the model family that CONTRIBUTING gives as its example."""

import pytest
import torch

from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import generators

REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def train(words, run_training):
    """A run of one step on the flow base."""

    def train(algorithm, **flags):
        run_training(algorithm, pretrained_model_name_or_path=words, **dict(max_train_steps=1) | flags)

    return train


def test_a_cps_and_an_sde_policy_are_trained_put_into_a_set_and_fused(train):
    kinds = {"share": {"share": 0.794}, "sde": {"noise_level": 0.7}}
    for algorithm, (kind, options) in zip(("ddpo", "dpo"), kinds.items(), strict=True):
        (option,) = (f"{name}={value}" for name, value in options.items())
        train(algorithm, variance=kind, variance_options=option, output_dir=kind, objective_name=kind)
        assert schedule_to_dict(read_adapter(kind).objective.variance) == {"kind": kind} | options
    create_set("set", list(kinds), base_schedule=read_adapter("sde").objective.variance)
    loaded = load_set("set")
    assert [schedule_to_dict(o.variance) for o in loaded.objectives] == [{"kind": k} | v for k, v in kinds.items()]
    sampler = FusedSampler.from_pretrained(loaded)
    drawn = [
        sampler.sample(["a cat"], weights, generator=generators(0), output_type="latent", progress=False)
        for weights in ({"share": 0.6, "sde": 0.4}, {"share": 1.0})
    ]
    assert all(bool(torch.isfinite(latents).all()) for latents in drawn)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
