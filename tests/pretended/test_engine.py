"""Optimiser steps on the device: what makes the host wait, dropped steps in float16, and images that are kept."""

import math
import weakref

import pytest
import torch

from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.train import validation
from stepfuse.train.algorithms import DDPO
from stepfuse.train.checkpoints import Progress
from stepfuse.train.distill_settings import DistillSettings, with_set
from stepfuse.train.distill_setup import DistillSetup
from stepfuse.train.distillation import Distillation
from stepfuse.train.health import Health
from stepfuse.train.launch import make_accelerator
from stepfuse.train.loop import train_adapter
from stepfuse.train.update import Update
from tests.fixtures_distill import save_opposed_set
from tests.fixtures_tiny import read_lora
from tests.fixtures_training import forget_accelerator
from tests.pretended.waits import counted
from tests.pretended.worlds import PROMPTS, RUNS, rollout_and_update, save_base, training_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(base, tmp_path, monkeypatch):
    """A run, which gives what was measured of each of its optimiser steps."""
    seen, update = [], Update.__call__

    def watched(*arguments, **options):
        seen.append(update(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(Update, "__call__", watched)

    def run(folder="out", **own):
        forget_accelerator()
        seen.clear()
        train_adapter(training_settings(base, tmp_path / folder, "DDPO", **RUNS["one objective"] | own))
        return list(seen)

    return run


@pytest.mark.parametrize(
    ("algorithm", "own"),
    [
        ("DDPO", RUNS["one objective"] | dict(mixed_precision="no")),
        ("DDPO", RUNS["one objective"] | dict(mixed_precision="fp16", log_prob_reduction="mean", beta=0)),
        ("DPO", RUNS["product of two objectives"] | dict(mixed_precision="bf16")),
    ],
    ids=["float32", "float16", "bfloat16"],
)
def test_an_optimiser_step_makes_the_host_wait_once_and_is_one_kernel(base, tmp_path, algorithm, own):
    waits = rollout_and_update(training_settings(base, tmp_path / "out", algorithm, **own)).update
    assert waits.total == 1, waits.lines
    assert waits.ops["aten::_fused_adamw_"] == 1


def test_a_step_of_distillation_makes_the_host_wait_once(tmp_path):
    forget_accelerator()
    adapter_set = load_set(save_opposed_set(tmp_path), read_weights=False)
    flags = dict(adapter_set=str(tmp_path / "set"), train_batch_size=2, sample_num_steps=3, mixed_precision="bf16")
    settings = with_set(DistillSettings(**flags), adapter_set)
    setup = DistillSetup(settings, make_accelerator(settings), PROMPTS, adapter_set)
    algorithm = Distillation(settings)
    update = Update(setup=setup, algorithm=algorithm, health=Health(Progress(), skips=False, main=True))
    batches, _ = algorithm.source(setup)(0)
    with counted() as waits:
        update(batches, 1)
    assert waits.total == 1, waits.lines


def test_in_float16_the_rate_goes_on_with_the_steps_that_were_made_also_after_a_resume(train, tmp_path, monkeypatch):
    # Two losses a step: of the first step one that is NaN, of the third one whose gradient is beyond float16.
    loss, factors = DDPO.loss, iter([float("nan"), 1, 1, 1, 1e30, *[1] * 3, float("nan"), *[1] * 3, 1e30, *[1] * 3])
    monkeypatch.setattr(DDPO, "loss", lambda self, *arguments: loss(self, *arguments) * next(factors))
    flags = dict(mixed_precision="fp16", nonfinite="skip", log_prob_reduction="mean", beta=0, checkpointing_steps=2)
    flags |= dict(lr_scheduler="constant_with_warmup", lr_warmup_steps=10, learning_rate=0.01, objective_name="mine")
    straight = train(**flags, max_train_steps=4)
    assert [math.isfinite(measured["gradient_norm"]) for measured in straight] == [False, True, False, True]
    assert [measured["learning_rate"] for measured in straight] == pytest.approx([0, 0.001, 0.001, 0.002])
    train("again", **flags, max_train_steps=2)
    resumed = train("again", **flags, max_train_steps=4, resume_from_checkpoint="latest")
    assert [measured["learning_rate"] for measured in resumed] == pytest.approx([0.001, 0.002])
    expected, found = (read_lora(tmp_path / folder / WEIGHTS) for folder in ("out", "again"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for folder in ("out", "again"):
        scaler = torch.load(tmp_path / folder / "checkpoint-4/scaler.pt", weights_only=True)
        assert scaler["scale"] == 2**16 / 4  # halved twice
    (entry,) = read_adapter(tmp_path / "again").record["health"]
    assert (entry["what"], entry["step"]) == ("skipped: a loss that is not finite", 1)


def test_images_to_validate_and_to_fit_a_reward_on_leave_the_device_before_the_next_but_one(train, monkeypatch):
    decode, drawn, held = validation.decode_finite, [], []

    def watched(*arguments):
        pixels = decode(*arguments)
        assert pixels.device.type == "cuda"
        drawn.append(weakref.ref(pixels))
        held.append(sum(each() is not None for each in drawn))
        return pixels

    monkeypatch.setattr(validation, "decode_finite", watched)
    train(fit_reward=6, num_validation_images=6, max_train_steps=1)
    assert len(drawn) == 3 * 6 / 2  # to fit, before and after
    assert max(held) == 2
