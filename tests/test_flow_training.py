"""Training on a flow path through its commands, on the model family that CONTRIBUTING gives as its example."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.offline import noise_pairs
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


def test_a_callback_gets_the_timesteps_of_the_scheduler(train):
    """As in diffusers' pipelines: 1000 sigma, of linspace(1, 1/4) with shift 2."""
    train("ddpo", objective_name="mine")
    create_set("set", ["out"])
    pipe, seen = FusedPipeline.from_pretrained("set"), []
    pipe.set_progress_bar_config(disable=True)

    def watch(_, index, timestep, inputs):
        seen.append((index, timestep))

    pipe("a cat", generator=generators(0), num_inference_steps=4, output_type="latent", callback_on_step_end=watch)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep in seen] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


def test_every_knot_of_a_learned_schedule_is_trained(train):
    """Knots at sigma 0, .5 and 1: of eight steps of shift 2, those with noise start at 1 to 2 · .25 / 1.25 = .4."""
    options = dict(variance="learned", variance_knots=3, variance_learning_rate=0.1, sample_num_steps=8)
    train("ddpo", max_train_steps=2, adam_weight_decay=0.0, **options)
    assert (read_adapter("out").objective.variance.offsets.abs() > 1e-3).all()


@pytest.fixture
def no_pause(monkeypatch):
    """datasets waits five seconds at the end of every pass, for threads that read ahead."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def test_a_flow_is_trained_on_preference_pairs(train, no_pause):
    def picture(value):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
        return file.getvalue()

    light, dark = picture(220), picture(30)
    rows = [{"jpg_0": light, "jpg_1": dark, "label_0": 1.0, "caption": f"prompt {i}"} for i in range(8)]
    Dataset.from_list(rows).to_parquet("pairs.parquet")
    flags = dict(pairs="pairs.parquet", beta=500, log_prob_reduction="mean", guidance="full", report_to="tensorboard")
    train("dpo", max_train_steps=30, **flags)
    log = EventAccumulator("out/logs/stepfuse")
    log.Reload()
    losses = [event.value for event in log.Scalars("loss")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # the policy is its reference
    assert sum(losses[-10:]) / 10 < 0.6


def test_pairs_are_noised_along_the_flow_at_a_time_of_their_own(words):
    """x_t = (1 - t) x_0 + t e, the network is told 1000 t, and its target is e - x_0."""
    backbone = backbone_of(load_pipeline(str(words)))
    denoiser = Denoiser(backbone=backbone, path=backbone.path(), guidance=Guidance(source="off"))
    winner, loser, e = (torch.randn(2, 3, 8, 8, generator=g) for g in generators(0, 1, 2))
    times = torch.cat([denoiser.path.draw(generator) for generator in generators(3, 4)])
    told = []
    backbone.network.register_forward_pre_hook(lambda _, __, inputs: told.append(inputs["timestep"]), with_kwargs=True)
    noised = noise_pairs(denoiser, winner, loser, e, times, backbone.encode(["a cat", "two keys"]).repeat(2))
    t = times.float().reshape(-1, 1, 1, 1)
    expected = torch.cat([(1 - t) * clean + t * e for clean in (winner, loser)])
    torch.testing.assert_close(noised.x_t, expected)
    torch.testing.assert_close(noised.target, torch.cat([e - winner, e - loser]))
    (timesteps,) = told
    torch.testing.assert_close(timesteps, 1000 * torch.cat([times, times]).float())
    assert 0 < times.min() < times.max() <= 1
