"""What makes training cheaper, and that it changes no number it should not."""

import builtins
import os
from pathlib import Path

import pytest
import torch

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.algorithms import DDPO
from stepfuse.train.collect import learned_steps
from stepfuse.train.conditioning import Embeddings
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.loop import train_adapter
from stepfuse.train.lora import Policy
from stepfuse.train.settings import DDPOSettings
from stepfuse.train.setup import learnable_steps
from tests.fixtures_tiny import denoiser_of, read_lora, refused
from tests.fixtures_training import (
    COMMON,
    forget_accelerator,
    refused_by,
)

REWARDS = """
def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))
"""


def weights(folder="out"):
    return read_lora(Path(folder) / "pytorch_lora_weights.safetensors")


def assert_near(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


# Some of the denoising steps


def ten_steps(tiny_base):
    pipeline = load_pipeline(str(tiny_base))
    denoiser = denoiser_of(pipeline.unet, pipeline.scheduler, guidance="off")
    steps = denoiser.path.steps(10)
    return Sampling(
        denoiser=denoiser, objectives=(Expert.adapter("mine", EtaSchedule()),), steps=steps, shape=(4, 8, 8)
    )


def test_a_fraction_of_the_steps_is_drawn_anew_for_each_rollout_the_same_everywhere(tiny_base):
    sampling = ten_steps(tiny_base)
    settings = DDPOSettings(train_timestep_fraction=0.3, sample_num_steps=10, skip_first_steps=2)
    learnable = learnable_steps(settings, sampling)
    assert learnable == list(range(2, 10))
    drawn = [learned_steps(settings, learnable, step) for step in range(60)]
    assert {len(places) for places in drawn} == {2}  # round(0.3 · 8)
    assert set().union(*drawn) == set(range(2, 10))  # the first two never
    assert drawn == [learned_steps(settings, learnable, step) for step in range(60)]
    assert learned_steps(DDPOSettings(sample_num_steps=10), list(range(10)), 5) == frozenset(range(10))


class Counted(DDPO):
    """DDPO that keeps what it was given."""

    def __init__(self, settings):
        super().__init__(settings)
        self.steps, self.modes = [], []

    def collect(self, *arguments):
        self.modes.append(torch.is_inference_mode_enabled())
        return super().collect(*arguments)

    def assign_advantages(self, trajectory, advantages):
        assigned = super().assign_advantages(trajectory, advantages)
        self.steps.append(assigned.steps)
        return assigned


def test_only_the_steps_drawn_are_kept_and_rollouts_run_in_inference_mode(run_training, tiny_base):
    own = COMMON | {"sample_num_steps": 6, "max_train_steps": 3, "train_timestep_fraction": 0.5}
    settings = DDPOSettings(**own, pretrained_model_name_or_path=str(tiny_base), num_generations=4)
    counted = Counted(settings)
    forget_accelerator()
    train_adapter(settings, counted)
    assert [len(steps) for steps in counted.steps] == [3, 3, 3]
    assert counted.modes == [True] * 3
    tensors = [value for steps in counted.steps for step in steps for value in vars(step).values()]
    assert not any(isinstance(value, torch.Tensor) and value.is_inference() for value in tensors)
    assert len({step.t for steps in counted.steps for step in steps}) > 3  # others in other rollouts


def test_a_run_finds_its_learnable_steps_once_and_trains_the_schedule_that_it_samples_with(run_training, monkeypatch):
    sampled, trained = [], []

    def find_steps(settings, sampling):
        sampled.append(sampling.objectives[0].schedule)
        return learnable_steps(settings, sampling)

    def make_policy(backbone, adapters, schedules, rows, **options):
        trained.extend(schedules)
        return Policy(backbone, adapters, schedules, rows, **options)

    monkeypatch.setattr("stepfuse.train.setup.learnable_steps", find_steps)
    monkeypatch.setattr("stepfuse.train.setup.Policy", make_policy)
    run_training("ddpo", max_train_steps=3, variance="learned")
    (schedule,) = sampled
    assert trained[0] is schedule


def test_the_kl_of_a_fraction_estimates_that_of_all_steps(run_training, tiny_base):
    # The policy moves by so little that both runs measure nearly the same one: 3 of 6 steps, twice their sum.
    own = COMMON | {"sample_num_steps": 6, "learning_rate": 1e-3, "report_to": "none", "max_train_steps": 12}
    own |= {"train_batch_size": 8}
    kl = {}
    for fraction in (1.0, 0.5):
        values = own | {"train_timestep_fraction": fraction, "output_dir": f"out-{fraction}"}
        settings = DDPOSettings(**values, pretrained_model_name_or_path=str(tiny_base), num_generations=4)
        forget_accelerator()
        train_adapter(settings, DDPO(settings))
        kl[fraction] = read_adapter(f"out-{fraction}").record["kl"]
    assert kl[0.5] == pytest.approx(kl[1.0], rel=0.6)
    assert kl[1.0] > 0


# No KL


def test_ddpo_without_a_kl_is_ddpo_with_hardly_any_and_measures_none(run_training):
    flags = dict(max_train_steps=3, num_inner_epochs=3, adam_epsilon=1e-3)
    run_training("ddpo", beta=1e-12, output_dir="hardly", **flags)
    run_training("ddpo", beta=0.0, **flags)
    assert_near(weights(), weights("hardly"), atol=1e-5)
    adapter = read_adapter("out")
    assert (adapter.objective.beta, adapter.record["kl"]) == (0, None)
    assert read_adapter("hardly").record["kl"] > 0


def test_an_adapter_trained_without_a_kl_has_no_temperature_to_weigh_rewards_by(run_training):
    run_training("ddpo", beta=0.0, max_train_steps=1, guidance="off")
    create_set("set", ["out"])
    sampler = FusedSampler.from_pretrained("set")
    with refused("'slope' was trained with none; weigh exponents"):
        sampler.sample(["a cat"], weights_on="rewards")
    assert len(sampler.sample(["a cat"])) == 1


@pytest.mark.parametrize("change", [{"max_kl": 1.0}, {"variance": "learned"}])
def test_what_needs_the_base_is_refused_without_a_kl(run_training, change):
    assert "beta is 0.0; expected a positive number beside max_kl" in refused_by(
        run_training, "ddpo", beta=0.0, **change
    )


# The same numbers


@pytest.mark.parametrize("algorithm", ["dpo", "ddpo"])
def test_gradient_checkpointing_and_text_encoders_elsewhere_change_no_number(run_training, algorithm):
    flags = dict(max_train_steps=2, adam_epsilon=1e-3)
    run_training(algorithm, output_dir="plain", **flags)
    run_training(algorithm, gradient_checkpointing="true", offload_text_encoders="true", **flags)
    assert_near(weights(), weights("plain"), atol=1e-5)


@pytest.mark.skipif("STEPFUSE_COMPILE" not in os.environ, reason="two minutes of compiling; STEPFUSE_COMPILE=1")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch compiles with deprecates itself
def test_a_compiled_unet_trains_to_the_same_adapter(run_training):
    flags = dict(max_train_steps=2, adam_epsilon=1e-3, sample_num_steps=2, guidance="off", num_validation_images=4)
    run_training("ddpo", output_dir="plain", **flags)
    run_training("ddpo", compile="regional", **flags)
    assert_near(weights(), weights("plain"), atol=1e-3)
    moved = weights()
    assert max(value.abs().max() for name, value in moved.items() if "lora_B" in name) > 1e-3


@pytest.mark.gpu
def test_text_encoders_stay_on_the_cpu_and_embeddings_do_not(tiny_base):
    loaded = load_pipeline(str(tiny_base))
    embed = Embeddings(backbone_of(loaded), torch.device("cuda"), offload=True)
    assert next(loaded.text_encoder.parameters()).device.type == "cpu"
    assert next(loaded.unet.parameters()).device.type == "cuda"
    assert embed(["a cat"]).positive["prompt_embeds"].device.type == "cuda"


# 8 bits


def test_8_bits_without_bitsandbytes_name_the_extra(run_training, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "bitsandbytes.optim":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    line = refused_by(run_training, "ddpo", use_8bit_adam="true", max_train_steps=1)
    assert "pip install 'stepfuse[8bit]'" in line


def test_adam_in_8_bits_takes_nearly_the_steps_of_adam_and_goes_on_to_the_same_bits(run_training):
    pytest.importorskip("bitsandbytes", reason="pip install 'stepfuse[8bit]'")
    flags = dict(
        max_train_steps=4, checkpointing_steps=2, adam_epsilon=1e-3, rank=64
    )  # smaller tensors stay in 32 bits
    run_training("ddpo", output_dir="plain", **flags)
    run_training("ddpo", output_dir="eight", use_8bit_adam="true", **flags)
    run_training("ddpo", **flags | {"max_train_steps": 2}, use_8bit_adam="true")
    run_training("ddpo", **flags, use_8bit_adam="true", resume_from_checkpoint="latest")
    eight, plain, resumed = weights("eight"), weights("plain"), weights()
    assert all(torch.equal(resumed[name], value) for name, value in eight.items())
    assert not all(torch.equal(plain[name], value) for name, value in eight.items())
    assert_near(eight, plain, atol=0.05)


# What a run refuses


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train_timestep_fraction", "0.0"),
        ("train_timestep_fraction", "1.5"),
        ("max_kl", "-1.0"),
        ("min_diversity", "1.0"),
        ("checkpoints_total_limit", "0"),
    ],
)
def test_a_share_or_limit_out_of_range_is_named(run_training, flag, value):
    assert f"{flag} is {value}; expected" in refused_by(run_training, "ddpo", **{flag: value})
