"""`kill -9` at any moment, and what a run that goes on from there ends with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.train.checkpoints import MANIFEST, TEMPORARY, damage
from tests.fixtures_distill import save_opposed_set
from tests.fixtures_forked import Training, launched
from tests.fixtures_training import save_tiny_pipeline

KILLS = 20
STEPS = 90
SETTINGS = {
    "prompts": "prompts.txt",
    "seed": 3,
    "sample_num_steps": 3,
    "sample_guidance_scale": 2.0,
    "num_validation_images": 2,
    "train_batch_size": 4,
    "num_generations": 4,
    "num_inner_epochs": 2,
    "per_prompt_stat_tracking_buffer_size": 10,
    "per_prompt_stat_tracking_min_count": 8,
    "learning_rate": 0.003,
    "lr_scheduler": "cosine",
    "reward": "slope.py:slope",
    "fit_reward": 4,
    "variance": "learned",
    "beta": 0.1,
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "load_best_model_at_end": True,
    "report_to": "none",
    "pretrained_model_name_or_path": "pipeline",
    "resume_from_checkpoint": "latest",
}
JOINT = {
    "objectives": [{"reward": "slope.py:slope"}, {"reward": "slope.py:flat", "rank": 2, "variance": "eta"}],
    "train_rule": "product",
    "max_train_steps": 4,
}
DISTILLATION = {
    "adapter_set": "set",
    "prompts": "prompts.txt",
    "num_validation_images": 2,
    "train_batch_size": 4,
    "lr_scheduler": "cosine",
    "max_train_steps": 8,
    "checkpointing_steps": 1,
    "report_to": "none",
    "resume_from_checkpoint": "latest",
}
# Says in a file when it is called: rollouts come before it, the update after it.
SLOPE = """
from pathlib import Path

def slope(images, prompts):
    Path("called").touch()
    return (images[:, 0, :, :8] - images[:, 2, :, -8:]).mean((1, 2)) * images.new_tensor([len(p) for p in prompts])

def flat(images, prompts):
    return -images.std((1, 2, 3))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("a red apple\na cat\ntwo keys\n")
    (folder / "slope.py").write_text(SLOPE)
    (folder / "ddpo.yaml").write_text(yaml.safe_dump(SETTINGS))
    joint = {name: value for name, value in SETTINGS.items() if not name.startswith("per_prompt")} | JOINT
    (folder / "joint.yaml").write_text(yaml.safe_dump(joint))
    return folder


@pytest.fixture(scope="module")
def processes(desk):
    with launched(desk) as processes:
        yield processes


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0002)


def same(found, expected):
    """Weights, variance and record, to the bit."""
    weights = "pytorch_lora_weights.safetensors"
    assert (found / weights).read_bytes() == (expected / weights).read_bytes()
    was, now = (json.loads((folder / "objective.json").read_text()) for folder in (expected, found))
    for values in (was, now):
        values["record"]["config"].pop("output_dir")
    assert now == was


@pytest.fixture(scope="module")
def straight(desk, processes):
    """The same run, never interrupted."""
    training = Training(processes, "straight")
    assert training.ended() == 0, (desk / "child.log").read_text()[-4000:]
    return desk / "straight"


def test_a_run_killed_at_20_moments_ends_with_the_bits_of_one_that_was_not(desk, processes, straight):
    output, called = desk / "killed", desk / "called"
    moments = random.Random(5)
    where = {"any": 0, "update": 0, "checkpoint": 0}
    aside = 0
    for number in range(KILLS):
        kind = ("any", "update", "any", "checkpoint")[number % 4]
        called.unlink(missing_ok=True)
        training = Training(processes, output.name)
        if kind == "any":  # from the start of the process through some steps
            time.sleep(moments.uniform(0, 1.5))
        else:
            # It is called to be fitted, to validate, then once a rollout: a checkpoint comes before the fifth call.
            for _ in range(moments.randint(2, 4) if list_checkpoints(output) else 5):
                wait_for(called.exists)
                called.unlink()
            if kind == "checkpoint":
                wait_for((output / TEMPORARY).exists)
                time.sleep(moments.uniform(0, 0.004))
            else:
                time.sleep(moments.uniform(0, 0.02))
        training.kill()
        assert training.ended() == -signal.SIGKILL, (desk / "child.log").read_text()[-4000:]
        where[kind] += 1
        aside += (output / TEMPORARY).exists()
        assert len(list_checkpoints(output)) <= 3  # one more than is kept, until the oldest is gone
        assert not [folder for folder in list_checkpoints(output) if damage(folder)]
    assert sum(where.values()) == KILLS
    assert aside > 0  # some were killed while a checkpoint was written
    assert not (output / "objective.json").exists()
    assert list_checkpoints(output)  # it had something to go on from
    training = Training(processes, output.name)  # to its end
    assert training.ended() == 0, (desk / "child.log").read_text()[-4000:]
    same(output, straight)
    assert [p.name for p in list_checkpoints(output)] == [f"checkpoint-{step}" for step in (STEPS - 2, STEPS)]
    assert not [p for p in output.iterdir() if p.name in (TEMPORARY, "checkpoint.old", ".lock")]


def test_a_run_on_a_flow_transformer_killed_in_an_update_ends_with_the_same_bits(desk, processes):
    flags = dict(pretrained_model_name_or_path="emoji-flow", max_train_steps=8)
    straight = Training(processes, "flow-straight", **flags)
    assert straight.ended() == 0, (desk / "child.log").read_text()[-4000:]
    output, called = desk / "flow-killed", desk / "called"
    called.unlink(missing_ok=True)
    training = Training(processes, output.name, **flags)
    for _ in range(5):  # as above; then the second rollout was scored
        wait_for(called.exists)
        called.unlink()
    training.kill()
    assert training.ended() == -signal.SIGKILL
    assert list_checkpoints(output)
    assert not (output / "objective.json").exists()
    assert Training(processes, output.name, **flags).ended() == 0, (desk / "child.log").read_text()[-4000:]
    same(output, desk / "flow-straight")


def test_a_joint_run_killed_in_an_update_ends_with_the_same_bits_and_the_same_weights(desk, processes):
    straight = Training(processes, "joint-straight", config="joint.yaml")
    assert straight.ended() == 0, (desk / "child.log").read_text()[-4000:]
    output, called = desk / "joint-killed", desk / "called"
    training = Training(processes, output.name, config="joint.yaml")
    wait_for(lambda: list_checkpoints(output))
    called.unlink(missing_ok=True)
    wait_for(called.exists)
    training.kill()
    assert training.ended() == -signal.SIGKILL
    assert list_checkpoints(output)
    assert not (output / "slope" / "objective.json").exists()
    again = Training(processes, output.name, config="joint.yaml")
    assert again.ended() == 0, (desk / "child.log").read_text()[-4000:]
    for name in ("slope", "flat"):
        same(output / name, desk / "joint-straight" / name)


def test_a_distillation_killed_after_a_checkpoint_ends_with_the_same_bits(desk, processes):
    save_opposed_set(desk)
    (desk / "distill.yaml").write_text(yaml.safe_dump(DISTILLATION))
    straight = Training(processes, "distill-straight", "distill")
    assert straight.ended() == 0, (desk / "child.log").read_text()[-4000:]
    output = desk / "distill-killed"
    training = Training(processes, output.name, "distill")
    wait_for(lambda: list_checkpoints(output))
    time.sleep(0.1)
    training.kill()
    assert training.ended() == -signal.SIGKILL
    assert not (output / "a" / "objective.json").exists()
    again = Training(processes, output.name, "distill")
    assert again.ended() == 0, (desk / "child.log").read_text()[-4000:]
    for name in ("a", "b"):
        same(output / name, desk / "distill-straight" / name)


@pytest.mark.parametrize("harm", ["truncated", "missing", "no manifest", "a bit"])
def test_a_newest_checkpoint_that_is_not_whole_is_passed_over(desk, processes, straight, harm):
    output = desk / harm.replace(" ", "-")
    output.mkdir()
    (output / "config.yaml").touch()
    older, newest = list_checkpoints(straight)
    for folder in (older, newest):
        subprocess.run(["cp", "-r", folder, output], check=True)
    hurt = output / newest.name
    file = hurt / "optimizer.bin"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "missing":
        file.unlink()
    elif harm == "no manifest":
        (hurt / MANIFEST).unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert damage(hurt)
    training = Training(processes, output.name)
    assert training.ended() == 0, (desk / "child.log").read_text()[-4000:]
    same(output, straight)
    assert not damage(hurt)  # written again


def test_a_second_run_in_one_folder_is_refused_and_a_dead_one_does_not_block(desk, processes):
    output = desk / "shared"
    first = Training(processes, output.name)
    wait_for((output / "config.yaml").exists)
    words = [sys.executable, str(Path(__file__).parents[1] / "train" / "ddpo.py"), "--config", "ddpo.yaml"]
    words += ["--output_dir", output.name, "--max_train_steps", "4"]
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still there
    second = subprocess.run(words, cwd=desk, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1
    line = second.stderr.splitlines()[-1]
    assert line.startswith("error: shared is in use by process ")
    assert str(first.pid) in line
    first.kill()
    assert first.ended() == -signal.SIGKILL
    assert (output / ".lock").exists()  # it had no time to tidy up
    third = Training(processes, output.name, max_train_steps=4)
    assert third.ended() == 0, (desk / "child.log").read_text()[-4000:]
    assert read_adapter(output).record["config"]["max_train_steps"] == 4
    assert not (output / ".lock").exists()
