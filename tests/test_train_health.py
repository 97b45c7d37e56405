"""What a run does about numbers that are not finite, a KL that runs away, images that become one, and no memory."""

import json
import logging
import resource
from pathlib import Path

import pytest
import torch

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.train.advantages import best_and_worst
from stepfuse.train.checkpoints import Progress, read_state
from stepfuse.train.health import IDLE, Health, diversity, thumbnails
from tests.fixtures_tiny import read_lora
from tests.fixtures_training import refused_by

REWARDS = """
import resource
from pathlib import Path

import torch

calls = 0

def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))

def infinite_at_step_2(images, prompts):
    # of DDPO: validation, then one call a step
    global calls
    calls += 1
    values = slope(images, prompts)
    if calls == 3:
        values[1], values[2] = float("nan"), float("-inf")
    return values

def infinite_candidate(images, prompts):
    # of DPO: with 8 images a call is of candidates
    global calls
    calls += len(images) == 8
    values = slope(images, prompts)
    if len(images) == 8 and calls == 5:
        values[3] = float("-inf")
    return values

def huge_at_step_2(images, prompts):
    global calls
    calls += 1
    return slope(images, prompts) * (1e38 if calls == 3 else 1)

def no_room_at_step_3(images, prompts):
    # a checkpoint is larger than what a file may be from here on
    global calls
    calls += 1
    if calls == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return slope(images, prompts)
"""


def record(folder="out"):
    return read_adapter(folder).record


def weights(folder="out"):
    return read_lora(Path(folder) / "pytorch_lora_weights.safetensors")


# Not finite


def test_a_reward_that_is_not_finite_is_left_out_where_that_is_asked_for(run_training, caplog):
    run_training(
        "ddpo", reward="rewards.py:infinite_at_step_2", nonfinite="skip", max_train_steps=3, train_batch_size=8
    )
    (entry,) = record()["health"]
    assert (entry["what"], entry["step"]) == ("skipped: a reward that is not finite", 2)
    assert 1 <= len(entry["prompts"]) <= 2
    assert set(entry["prompts"]) <= {"a red apple", "a cat", "two keys"}
    assert record()["steps"] == 3
    assert all(torch.isfinite(value).all() for value in weights().values())
    (line,) = [entry.getMessage() for entry in caplog.records if "not finite" in entry.getMessage()]
    assert line.startswith("step 2: ")
    assert entry["prompts"][0] in line


def test_a_reward_that_is_not_finite_stops_and_names_step_and_prompts_unless_told_otherwise(run_training):
    line = refused_by(run_training, "ddpo", reward="rewards.py:infinite_at_step_2", max_train_steps=3)
    assert "step 2" in line
    assert "nan" in line


def test_an_image_without_a_reward_teaches_nothing_and_the_others_are_normalised_without_it():
    from stepfuse.train.algorithms import DDPO
    from stepfuse.train.settings import DDPOSettings

    settings = DDPOSettings(num_generations=4)
    rewards = torch.tensor([[1.0], [float("nan")], [3.0], [2.0]])
    groups = torch.zeros(4, dtype=torch.long)
    advantages = DDPO(settings).advantages(rewards, torch.ones(4, 1), groups, ["a cat"] * 4, {})
    # of 1, 3, 2: mean 2, deviation sqrt(2/3)
    assert advantages.tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5, 0])


def test_a_step_with_a_candidate_that_is_not_finite_makes_no_pair(run_training):
    values = torch.tensor([[0.0, 1.0], [float("-inf"), 1.0], [float("nan"), 1.0], [0.0, float("inf")]])
    assert best_and_worst(values, 0.0)[2].tolist() == [True, False, False, False]
    run_training("dpo", reward="rewards.py:infinite_candidate", nonfinite="skip", num_candidates=2, max_train_steps=2)
    (entry,) = record()["health"]
    assert entry["what"] == "skipped: a reward that is not finite"
    assert len(entry["prompts"]) == 1
    assert all(torch.isfinite(value).all() for value in weights().values())


def gradient_without_bounds(monkeypatch, at, factor=float("inf")):
    """The real loss, times infinity at one update, or so large a number that its gradient has no finite norm."""
    from stepfuse.train.algorithms import DDPO

    real, updates = DDPO.loss, iter(range(1000))

    def loss(self, policy, reference, step):
        values = real(self, policy, reference, step)
        return values * factor if next(updates) == 3 * at else values  # three denoising steps each

    monkeypatch.setattr(DDPO, "loss", loss)


@pytest.mark.parametrize(("factor", "what"), [(float("inf"), "loss"), (1e30, "gradient")])
def test_what_is_not_finite_stops_before_the_policy_is_touched(run_training, monkeypatch, factor, what):
    gradient_without_bounds(monkeypatch, at=1, factor=factor)
    line = refused_by(run_training, "ddpo", max_train_steps=3, checkpointing_steps=1)
    assert f"step 2: a {what} that is not finite" in line
    assert "'a " in line or "'two keys'" in line
    assert "--nonfinite skip" in line
    assert [p.name for p in list_checkpoints(Path("out"))] == ["checkpoint-1"]


@pytest.mark.parametrize(("factor", "what"), [(float("inf"), "loss"), (1e30, "gradient")])
def test_a_skipped_update_leaves_the_policy_as_it_was(run_training, monkeypatch, factor, what):
    gradient_without_bounds(monkeypatch, at=1, factor=factor)
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, nonfinite="skip", checkpoints_total_limit=5)
    first, second = (read_state(Path(f"out/checkpoint-{step}/policy.safetensors")) for step in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rate = torch.load("out/checkpoint-2/custom_checkpoint_0.pkl", weights_only=True)  # accelerate's name for it
    assert rate["last_epoch"] == 1  # of two steps
    (entry,) = record()["health"]
    assert (entry["what"], entry["step"]) == (f"skipped: a {what} that is not finite", 2)
    assert json.loads(Path("out/checkpoint-2/progress.json").read_text())["health"] == [entry]


# KL


def test_training_stops_where_the_kl_runs_away_and_the_best_checkpoint_is_the_adapter(run_training):
    flags = dict(checkpointing_steps=1, checkpoints_total_limit=1, learning_rate=0.03, num_validation_images=8)
    run_training("ddpo", max_train_steps=12, output_dir="free", **flags)
    free = record("free")["kl"]
    run_training("ddpo", max_train_steps=12, max_kl=free / 4, validation_set="prompts.txt", **flags)
    own = record()
    (entry,) = [entry for entry in own["health"] if entry["what"].startswith("stopped")]
    assert entry["kl"] > free / 4 == entry["max_kl"]
    assert own["steps"] == own["best"]["step"] < entry["step"] < 12
    assert own["validation"]["after"] == own["best"]["validation"]
    # Only the newest checkpoint is kept, and the best one was another or it: its policy is in either.
    (kept,) = list_checkpoints(Path("out"))
    best = read_state(kept / "best.safetensors")
    found = weights()
    assert all(torch.equal(found[f"unet.{name}"], value) for name, value in best.items())
    # the same run as the free one up to there
    run_training("ddpo", max_train_steps=own["steps"], output_dir="short", **flags)
    assert all(torch.equal(value, found[name]) for name, value in weights("short").items())


def test_a_kl_beyond_the_limit_before_any_checkpoint_says_what_to_change(run_training):
    line = refused_by(run_training, "ddpo", max_train_steps=9, max_kl=1e-9, learning_rate=0.03)
    assert "max_kl 1e-09" in line
    assert "checkpointing_steps (500)" in line
    assert not Path("out/objective.json").exists()


def test_the_best_checkpoint_is_the_one_whose_validation_images_have_the_highest_reward(run_training):
    flags = dict(max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=None, validation_steps=1)
    flags |= dict(num_validation_images=8, learning_rate=0.05, load_best_model_at_end="true")
    flags.pop("checkpoints_total_limit")
    run_training("ddpo", **flags, checkpoints_total_limit=9, report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator("out/logs/stepfuse")
    log.Reload()
    rewards = {event.step: event.value for event in log.Scalars("validation_reward") if event.step}
    best = max(rewards, key=rewards.__getitem__)
    assert record()["best"]["step"] == record()["steps"] == best
    assert record()["validation"]["after"]["reward"] == pytest.approx(rewards[best], rel=1e-6)
    policy = read_state(Path(f"out/checkpoint-{best}/policy.safetensors"))
    found = weights()
    assert all(torch.equal(found[f"unet.{name}"], value) for name, value in policy.items())


# Diversity


def test_diversity_is_the_deviation_among_the_images_of_a_group():
    # two groups of two: pixels 0 and 1 (deviation 1/2), and 3 and 3 (none): sqrt((1/4 + 0) / 2)
    images = torch.tensor([0.0, 1.0, 3.0, 3.0])[:, None, None, None].expand(4, 3, 8, 8)
    assert diversity(images, torch.tensor([7, 7, 9, 9])) == pytest.approx((1 / 8) ** 0.5)
    assert diversity(images, torch.tensor([7, 8, 9, 9])) == 0
    # numpy's own deviation of each pixel, all one group
    noise = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (noise.numpy().astype("float64").var(0).mean()) ** 0.5
    assert diversity(noise, torch.zeros(16)) == pytest.approx(expected, rel=1e-6)


def test_a_thumbnail_is_the_mean_of_each_block_of_pixels():
    pixels = torch.arange(16.0).reshape(1, 1, 16, 1).expand(1, 3, 16, 16)
    assert thumbnails(pixels)[0, 0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]


def test_collapsed_diversity_is_told_once_and_kept(run_training, caplog):
    # No rollout of so short a run has lost two thirds of what the base has; a floor just below 1 is crossed by chance.
    run_training("ddpo", max_train_steps=8, min_diversity=0.999, learning_rate=0.03)
    (entry,) = [entry for entry in record()["health"] if entry["what"] == "diversity has collapsed"]
    assert 0 < entry["diversity"] < 0.999 * entry["base"]
    (line,) = [entry.getMessage() for entry in caplog.records if "collapsed" in entry.getMessage()]
    assert line.startswith(f"step {entry['step']}: diversity has collapsed")
    assert caplog.records[-1].levelno >= logging.WARNING
    run_training("ddpo", max_train_steps=2, min_diversity=0.01, output_dir="fine")
    assert record("fine")["health"] == []


# No room


def test_a_disk_without_room_loses_no_earlier_checkpoint_and_the_run_goes_on(run_training, monkeypatch):
    flags = dict(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=9)
    run_training("ddpo", output_dir="straight", objective_name="mine", **flags)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        line = refused_by(run_training, "ddpo", reward="rewards.py:no_room_at_step_3", objective_name="mine", **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the checkpoint of step 3 could not be written to out" in line
    assert "(checkpoint-1, checkpoint-2)" in line
    assert "--resume_from_checkpoint latest" in line
    assert sorted(p.name for p in Path("out").iterdir()) == ["checkpoint-1", "checkpoint-2", "config.yaml", "samples"]
    run_training("ddpo", objective_name="mine", resume_from_checkpoint="latest", **flags)
    expected, found = weights("straight"), weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_memory_that_does_not_suffice_names_the_knobs_with_their_values(run_training):
    status = Path("/proc/self/statm").read_text().split()
    taken = int(status[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, hard))
    try:
        sizes = dict(resolution=16384, train_batch_size=5, num_candidates=3, timesteps_per_forward=2)
        line = refused_by(run_training, "dpo", **sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert line.startswith("error: out of memory")
    for knob in ("--train_batch_size (now 5;", "--num_candidates (now 3", "--gradient_checkpointing (now off)"):
        assert knob in line
    assert "--timesteps_per_forward 1 (now 2)" in line
    for knob in ("--offload_text_encoders (now off)", "zero2-offload.yaml", "--resolution (now 16384)"):
        assert knob in line
    assert not Path("out").exists()


def test_a_run_of_dpo_without_a_pair_to_train_on_warns_at_once_and_stops_after_ten_steps(caplog) -> None:
    health = Health(Progress(), skips=False, main=True)
    with caplog.at_level("WARNING"):
        for step in range(1, IDLE):
            health.check_pairs(0.0, step, 0.5)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "step 1: no two candidates have rewards that differ by more than margin 0.5"
    ]
    with pytest.raises(ValueError, match=r"in the first 10 steps .* pass a smaller --margin, such as 0"):
        health.check_pairs(0.0, IDLE, 0.5)
    trained = Health(Progress(), skips=False, main=True)
    for step in range(1, 2 * IDLE):
        trained.check_pairs(0.25 if step == 2 else 0.0, step, 0.5)
