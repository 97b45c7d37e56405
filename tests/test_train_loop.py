"""The training loop in this process: faulty rewards, folders that hold something, resuming, precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepfuse.data.file_info import file_hash
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.train.algorithms import DPO
from stepfuse.train.checkpoints import read_state
from stepfuse.train.engine import make_optimizer
from stepfuse.train.loop import train_adapter
from stepfuse.train.settings import DPOSettings
from tests.fixtures_training import (
    COMMON,
    MAIN,
    PolicyWorld,
    Watched,
    forget_accelerator,
    refused_by,
    two_epochs,
)

REWARDS = """
import torch

calls = 0

def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))

def nan_at_step_2(images, prompts):
    # validation, then one call a step: the third is that of step 2
    global calls
    calls += 1
    values = slope(images, prompts)
    if calls == 3:
        values[2] = float("nan")
    return values

def interrupted_at_step_2(images, prompts):
    global calls
    calls += 1
    if calls % 3 == 0:
        raise KeyboardInterrupt
    return slope(images, prompts)

def one_for_all(images, prompts):
    return slope(images, prompts).mean()

def a_list(images, prompts):
    return slope(images, prompts).tolist()
"""


def contents(folder):
    return {str(file): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


# Faulty images and rewards


def test_validation_images_that_are_not_finite_are_named(run_training):
    Path("prompts.txt").write_text("a red apple\n")
    line = refused_by(run_training, "ddpo", sample_guidance_scale=3e38)
    assert "a red apple" in line
    assert "not finite" in line


def test_reward_that_turns_nan_names_step_and_prompt_and_keeps_the_checkpoint(run_training):
    # prompts are drawn by shuffled passes, so the third of step 2 may be any of them: ask for one alone
    Path("prompts.txt").write_text("a red apple\n")
    flags = dict(max_train_steps=3, checkpointing_steps=1)
    line = refused_by(run_training, "ddpo", reward="rewards.py:nan_at_step_2", **flags)
    assert "step 2" in line
    assert "rewards.py:nan_at_step_2" in line
    assert "'a red apple'" in line
    assert "nan" in line
    assert [p.name for p in Path("out").glob("checkpoint*")] == ["checkpoint-1"]
    assert not Path("out/objective.json").exists()
    # nothing is lost: with the reward mended the run goes on from there
    run_training(
        "ddpo", reward="rewards.py:slope", objective_name="nan_at_step_2", **flags, resume_from_checkpoint="latest"
    )
    assert [read_adapter("out").record[key] for key in ("steps", "algorithm", "processes")] == [3, "ddpo", 1]


@pytest.mark.parametrize(
    ("reward", "culprit"), [("one_for_all", "returned shape () for"), ("a_list", "returned a list for")]
)
@pytest.mark.parametrize("algorithm", MAIN)
def test_reward_of_the_wrong_shape_is_named(run_training, algorithm, reward, culprit):
    line = refused_by(run_training, algorithm, reward=f"rewards.py:{reward}")
    assert f"'rewards.py:{reward}'" in line
    assert culprit in line


def test_reward_of_the_wrong_shape_is_found_before_anything_is_written(run_training):
    refused_by(run_training, "dpo", reward="rewards.py:one_for_all")
    assert contents("out") == {}


# Settings that only the loaded base can judge


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (
            {"lora_target_modules": "to_w"},
            "lora_target_modules to_w: no layer of the model has such a name; it has",
        ),
        ({"lora_target_modules": "tok"}, "to_k, to_v"),
        ({"sample_num_steps": 2000}, "2000 sampling steps; expected 1 to 1000"),
        ({"resolution": 18}, "height is 18; expected a positive multiple of 4"),
        ({"lr_scheduler": "cosinus"}, "cosinus"),
        ({"objective_name": "two words"}, "objective name 'two words'"),
        ({"objective_name": "v1.5"}, "objective name 'v1.5'"),
    ],
)
def test_setting_that_does_not_fit_the_base_is_found_before_anything_is_written(run_training, flags, culprit):
    line = refused_by(run_training, "dpo", **flags, max_train_steps=1)
    assert culprit in line
    assert not Path("out").exists()


# Folders that hold something


@pytest.mark.parametrize("flags", [{"reward": "rewards.py:one_for_all"}, {"lora_target_modules": "to_w"}])
def test_overwriting_loses_nothing_where_the_run_cannot_start(run_training, flags):
    Path("out").mkdir()
    Path("out/objective.json").write_text("precious")
    refused_by(run_training, "dpo", **flags, overwrite="true")
    assert contents("out") == {"out/objective.json": b"precious"}


def test_overwriting_leaves_nothing_of_what_was_there(run_training):
    Path("out/checkpoint-9").mkdir(parents=True)
    Path("out/checkpoint-9/progress.json").write_text("{}")
    run_training("dpo", overwrite="true", max_train_steps=1)
    assert read_adapter("out").record["steps"] == 1
    assert not list(Path("out").glob("checkpoint*"))


def test_overwriting_keeps_files_of_other_origin_and_the_folder(run_training):
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, report_to="tensorboard")
    foreign = {"prompts-of-mine.txt": "a cat", "samples/mine.png": "mine", "checkpoint-notes/x": "mine"}
    for name, text in foreign.items():
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_text(text)
    place, logs = Path("out").stat().st_ino, set(Path("out/logs").rglob("events*"))
    assert logs
    run_training("ddpo", overwrite="true", max_train_steps=1, seed=1, prompts="out/prompts-of-mine.txt")
    assert Path("out").stat().st_ino == place
    assert {name: Path("out", name).read_text() for name in foreign} == foreign
    assert not list(Path("out").glob("checkpoint-[0-9]*"))
    assert not logs & set(Path("out").rglob("events*"))
    assert read_adapter("out").record["config"]["seed"] == 1


@pytest.mark.parametrize(
    "name", ["config.yaml", "pytorch_lora_weights.safetensors", "checkpoint-500/model.safetensors"]
)
def test_overwriting_refuses_files_of_another_program(run_training, name):
    """The oldest checkpoints are dropped: one of another program's would be lost."""
    file = Path("out", name)
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert name in refused_by(run_training, "dpo", overwrite="true", max_train_steps=1)
    assert contents("out") == {str(file): b"mine"}


def test_output_may_be_a_link_or_the_working_directory(run_training, monkeypatch):
    Path("real").mkdir()
    Path("link").symlink_to("real")
    run_training("dpo", output_dir="link", max_train_steps=1)
    assert read_adapter("real").record["steps"] == 1
    for name in ("prompts.txt", "rewards.py"):
        Path("real", name).write_bytes(Path(name).read_bytes())
    monkeypatch.chdir("real")
    run_training("dpo", output_dir=".", overwrite="true", max_train_steps=2)
    assert read_adapter(".").record["steps"] == 2
    assert Path("prompts.txt").exists()
    assert Path("../link").is_symlink()


# Resuming


def test_two_steps_and_two_more_are_four(run_training):
    run_training("ddpo", max_train_steps=4, output_dir="straight", checkpointing_steps=2)
    run_training("ddpo", max_train_steps=2, checkpointing_steps=2)
    run_training("ddpo", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
    for file in ("pytorch_lora_weights.safetensors", "checkpoint-4/policy.safetensors"):
        straight, resumed = load_file(f"straight/{file}"), load_file(f"out/{file}")
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    records = [read_adapter(folder).record for folder in ("straight", "out")]
    assert records[0]["validation"] == records[1]["validation"]
    assert records[0]["kl"] == records[1]["kl"] > 0


def test_a_checkpoint_of_an_earlier_version_is_resumed(run_training):
    """Its keys are those of peft."""
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, output_dir="straight")
    shutil.copytree("straight/checkpoint-1", "out/checkpoint-1")
    earlier = Path("out/checkpoint-1/policy.safetensors")
    save_file(read_state(earlier), earlier)
    assert any(key.startswith("down_blocks.") for key in load_file(earlier))
    manifest = Path("out/checkpoint-1/manifest.json")
    files = json.loads(manifest.read_text())["files"] | {earlier.name: file_hash(earlier)}
    manifest.write_text(json.dumps({"files": files}))
    run_training("ddpo", max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    ends = [load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in ("straight", "out")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("changes", "best"), [({}, 1), ({"mixed_precision": "bf16"}, 2), ({"pretrained_model_name_or_path": "copy"}, 2)]
)
def test_a_best_checkpoint_of_other_validation_settings_is_not_compared(run_training, tiny_base, changes, best):
    shutil.copytree(tiny_base, "copy")
    flags = dict(checkpointing_steps=1, load_best_model_at_end="true")
    run_training("ddpo", max_train_steps=1, **flags)
    progress, manifest = Path("out/checkpoint-1/progress.json"), Path("out/checkpoint-1/manifest.json")
    values = json.loads(progress.read_text())
    values["best"]["validation"]["reward"] = 1e9  # no later policy is better
    progress.write_text(json.dumps(values))
    files = json.loads(manifest.read_text())["files"] | {progress.name: file_hash(progress)}
    manifest.write_text(json.dumps({"files": files}))
    run_training("ddpo", max_train_steps=2, **flags, resume_from_checkpoint="latest", **changes)
    record = read_adapter("out").record
    assert record["steps"] == record["best"]["step"] == best


def test_first_checkpoint_of_a_run_with_two_updates_a_rollout_leads_to_the_same_end(run_training):
    flags = dict(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=4, num_inner_epochs=2)
    run_training("ddpo", **flags, output_dir="straight")
    first = min(Path("straight").glob("checkpoint-*"))
    Path("out").mkdir()
    first.rename(Path("out") / first.name)
    run_training("ddpo", **flags, resume_from_checkpoint="latest")
    straight, resumed = (load_file(f"{name}/pytorch_lora_weights.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_an_interrupted_run_says_how_to_resume(run_training, capsys):
    flags = dict(reward="rewards.py:interrupted_at_step_2", max_train_steps=3)
    with pytest.raises(SystemExit) as end:
        run_training("ddpo", **flags, checkpointing_steps=1)
    assert end.value.code == 130  # 128 + SIGINT, as shells have it
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted")]
    assert "out/checkpoint-1" in line
    assert "--resume_from_checkpoint latest" in line
    with pytest.raises(SystemExit) as end:
        run_training("ddpo", **flags, output_dir="early")
    assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]


# Precision


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
def test_every_update_that_follows_its_rollout_starts_from_a_ratio_of_exactly_1(
    run_training, tiny_base, precision, guidance
):
    settings = two_epochs(tiny_base, mixed_precision=precision, guidance=guidance, variance="learned")
    watched = Watched(settings)
    forget_accelerator()
    train_adapter(settings, watched)
    updates = [watched.ratios[i : i + 3] for i in range(0, 12, 3)]  # three denoising steps each
    assert updates[0] == updates[2] == [[0.0] * 4] * 3
    assert max(abs(ratio) for update in (updates[1], updates[3]) for step in update for ratio in step) > 1e-4
    assert watched.kl[:3] == [0.0] * 3
    assert min(watched.kl[6:9]) > 0  # the third update starts from a LoRA that has learned
    # what a run reports is the KL of an image, p_θ to p_ref, summed over its denoising steps
    assert read_adapter("out").record["kl"] == pytest.approx(sum(watched.kl[9:]), rel=1e-5)


def test_bf16_adapter_is_saved_in_float32(run_training, tiny_base):
    settings = DPOSettings(
        **COMMON, pretrained_model_name_or_path=str(tiny_base), mixed_precision="bf16", max_train_steps=2
    )
    forget_accelerator()
    train_adapter(settings, DPO(settings))
    state = load_file("out/pytorch_lora_weights.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    learned = torch.cat([value.flatten() for name, value in state.items() if "lora_B" in name or ".up." in name])
    assert not torch.equal(learned, learned.bfloat16().float())


def test_a_policy_takes_the_parameter_names_of_earlier_deepspeed_checkpoints():
    policy, other = PolicyWorld(trained=True).policy, PolicyWorld().policy
    state = {name.replace("network.", "unet.", 1): value for name, value in policy.state_dict().items()}
    assert any(name.startswith("unet.") and "lora_B" in name for name in state)
    assert other.load_state_dict(state, strict=True).unexpected_keys == []
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimiser_keeps_its_own_kernel_with_the_state_of_another(fused):
    """A checkpoint of a run on a GPU, whose kernel is fused, resumed on a CPU; or one of earlier versions on a GPU."""
    settings = DPOSettings(learning_rate=0.01)
    steps = {}
    for kernel in (fused, not fused):
        policy = PolicyWorld().policy
        optimizer = make_optimizer(policy, settings, fused=kernel)
        if steps:
            optimizer.load_state_dict(steps[fused])
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        steps[kernel] = optimizer.state_dict()
    assert [bool(group["fused"]) for group in steps[not fused]["param_groups"]] == [not fused]
    assert {state["step"].item() for state in steps[not fused]["state"].values()} == {2}
