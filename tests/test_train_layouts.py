"""The same numbers however a run is laid out, by `accelerate launch` and the configurations that are shipped.

Without a GPU processes talk by gloo, DeepSpeed's too.
"""

import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.scripts.evaluation.training_images import images_of_run
from stepfuse.train.checkpoints import read_state
from tests.fixtures_forked import Training, launched
from tests.fixtures_tiny import read_lora
from tests.fixtures_training import as_flags, launch_command, save_tiny_pipeline, train_here

REPOSITORY = Path(__file__).parents[1]
ACCELERATE = REPOSITORY / "configs" / "accelerate"
STEPS = 12  # six rollouts: twice and more of every prompt
SETTINGS = {
    "prompts": "prompts.txt",
    "seed": 3,
    "sample_num_steps": 3,
    "sample_guidance_scale": 2.0,
    "num_validation_images": 3,
    "learning_rate": 0.003,
    "lr_warmup_steps": 2,
    "adam_epsilon": 1e-3,  # as in test_train_command.py
    "reward": "slope.py:slope",
    "fit_reward": 5,
    "variance": "learned",
    "variance_knots": 3,
    "beta": 0.1,
    "max_train_steps": STEPS,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": None,
    "pretrained_model_name_or_path": "pipeline",
}
OWN = {
    "ddpo": {
        "num_generations": 4,
        "num_inner_epochs": 2,
        "lr_scheduler": "constant_with_warmup",
        "per_prompt_stat_tracking_buffer_size": 10,
        "per_prompt_stat_tracking_min_count": 8,
    },
    "dpo": {
        "num_candidates": 2,
        "train_timestep_fraction": 0.7,
        "timesteps_per_forward": 2,
        "lr_scheduler": "cosine",
    },
    "flow": {  # DDPO on a small Stable Diffusion 3
        "pretrained_model_name_or_path": "emoji-flow",
        "num_generations": 4,
        "max_train_steps": 4,
    },
    "joint": {  # of two groups a step one is a mixture and one all on one objective
        "objectives": [{"reward": "slope.py:slope"}, {"reward": "slope.py:flat", "rank": 2, "variance_knots": 2}],
        "train_rule": "product",
        "num_generations": 4,
        "max_train_steps": 4,
    },
}
PROGRAMS = {"ddpo": "ddpo.py", "dpo": "dpo.py", "flow": "ddpo.py", "joint": "ddpo.py"}
TWO = ["--config_file", str(ACCELERATE / "cpu-2.yaml"), "--main_process_port", "0"]
ZERO2 = ["--config_file", str(ACCELERATE / "zero2.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
ZERO2 += ["--main_process_port", "0"]
SLOPE = """
def slope(images, prompts):
    return (images[:, 0, :, :8] - images[:, 2, :, -8:]).mean((1, 2)) * images.new_tensor([len(p) for p in prompts])

def flat(images, prompts):
    return -images.std((1, 2, 3))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("a red apple\na cat\na boat on a blue background\ntwo keys\na green tree\n")
    (folder / "slope.py").write_text(SLOPE)
    for name, own in OWN.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(SETTINGS | own))
    # With its defaults ZeRO-3 leaves tensors as small as these whole, and hides what it does to others.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    config = yaml.safe_load((ACCELERATE / "zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": "zero3.json", "zero3_init_flag": False}
    del config["mixed_precision"]  # a matter of the file then
    (folder / "zero3.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2}))
    return folder


def command(name, launcher, output, **flags):
    own = as_flags({"config": f"{name}.yaml", "output_dir": output} | flags)
    return launch_command(REPOSITORY / "train" / PROGRAMS[name], *own, launcher=launcher)


def launch(desk, name, launcher, output, **flags):
    words = command(name, launcher, output, **flags)
    done = subprocess.run(words, cwd=desk, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return desk / output


def train(desk, name, processes, output, **flags):
    """A run in children of processes that `accelerate launch` has started, which saves their imports."""
    training = Training(processes, output, Path(PROGRAMS[name]).stem, **{"config": f"{name}.yaml"} | flags)
    assert training.ended() == 0, (desk / "child.log").read_text()[-6000:]
    return desk / output


def curves(folder):
    """What was logged by name, a number a step."""
    log = EventAccumulator(str(folder / "logs" / "stepfuse"))
    log.Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def adapters(folder):
    """The folders of a run's adapters: its own, or one for each of several objectives."""
    return sorted(file.parent for file in folder.rglob("objective.json"))


def tensors(folder, step=None):
    """The adapter, or the policy of a checkpoint."""
    if step:
        return read_state(folder / f"checkpoint-{step}/policy.safetensors")
    return read_lora(folder / "pytorch_lora_weights.safetensors")


def assert_same(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


def assert_same_run(found, expected):
    """Loss, KL and rewards at every step, and the adapters."""
    was, now = curves(expected), curves(found)
    rewards = [tag for tag in was if tag.startswith("reward")]
    for tag in ("loss", "kl", "diversity", "gradient_norm", *rewards):
        near = 1e-3 if tag == "gradient_norm" else 1e-4
        # A loss of DDPO that starts a rollout is a sum of advantages that is 0, and what is left of it is rounding.
        assert now[tag] == pytest.approx(was[tag], rel=near, abs=near), tag
    for folder in adapters(expected):
        other = found / folder.relative_to(expected)
        assert_same(tensors(other), tensors(folder), atol=1e-4)
        before, record = (read_adapter(each).record for each in (folder, other))
        assert len(was["loss"]) == record["steps"] > 0
        assert record["validation"]["after"] == pytest.approx(before["validation"]["after"], rel=1e-4)
        assert images_of_run(record) == images_of_run(before) > 0
        learned = tensors(folder)
        assert max(value.abs().max() for name, value in learned.items() if "lora_B" in name) > 5e-3


@pytest.fixture(scope="module")
def one(desk):
    """Runs of one process, which is this one: it saves the imports of others."""
    return {
        name: train_here(desk, Path(PROGRAMS[name]).stem, SETTINGS | own, f"{name}-one", train_batch_size=8)
        for name, own in OWN.items()
    }


@pytest.fixture(scope="module")
def two_processes(desk):
    with launched(desk, TWO, processes=2) as processes:
        yield processes


@pytest.fixture(scope="module")
def zero2_processes(desk):
    with launched(desk, ZERO2, processes=2) as processes:
        yield processes


@pytest.fixture(scope="module")
def zero2(desk, zero2_processes):
    return train(desk, "ddpo", zero2_processes, "ddpo-zero2", train_batch_size=4)


@pytest.mark.parametrize("name", OWN)
def test_two_processes_of_four_are_one_of_eight(desk, one, two_processes, name):
    assert_same_run(train(desk, name, two_processes, f"{name}-two", train_batch_size=4), one[name])


def test_zero_2_is_one_process(one, zero2):
    assert_same_run(zero2, one["ddpo"])


def test_zero_2_is_one_process_on_a_flow_transformer(desk, one, zero2_processes):
    assert_same_run(train(desk, "flow", zero2_processes, "flow-zero2", train_batch_size=4), one["flow"])


def test_zero_2_goes_on_from_a_checkpoint_to_the_same_bits(desk, zero2, zero2_processes):
    output = desk / "ddpo-zero2-resumed"
    output.mkdir()
    (zero2 / "checkpoint-8").rename(output / "checkpoint-8")
    train(desk, "ddpo", zero2_processes, output.name, train_batch_size=4, resume_from_checkpoint="latest")
    assert_same(tensors(output), tensors(zero2), atol=0)


def test_zero_3_saves_the_factors_that_zero_2_saves(desk, zero2):
    found = launch(desk, "ddpo", ["--config_file", "zero3.yaml"], "ddpo-zero3", max_train_steps=2, train_batch_size=4)
    last = tensors(found, 2)
    assert_same(last, tensors(zero2, 2), atol=1e-5)
    for name, value in tensors(found).items():
        assert torch.equal(value, last[name.removeprefix("unet.")])
        assert value.numel() > 0
        assert float(value.abs().max()) > 0, name
    assert read_adapter(found).record["steps"] == 2


def test_two_machines_of_one_process_are_one_of_two(desk, one):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = dict(train_batch_size=4, max_train_steps=2)
    config = ["--config_file", str(ACCELERATE / "multi-node.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launchers = [[*config, *address, "--machine_rank", str(rank)] for rank in range(2)]
    machines = [
        subprocess.Popen(
            command("ddpo", launcher, "ddpo-machines", **own),
            cwd=desk,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for launcher in launchers
    ]
    told = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert curves(desk / "ddpo-machines")["loss"] == pytest.approx(curves(one["ddpo"])["loss"][:2], rel=1e-4, abs=1e-4)


# Launched otherwise than it would run


def test_deepspeed_that_accelerate_would_leave_out_is_refused(desk, zero2_processes):
    log = desk / "child.log"
    told = log.stat().st_size if log.exists() else 0
    training = Training(zero2_processes, "refused", environment={"ACCELERATE_USE_CPU": "true"})
    assert training.ended() == 1
    said = log.read_bytes()[told:].decode()  # in bytes, as the size is: bars of progress are not ASCII
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "DeepSpeed" in line
    assert "use_cpu" in line
