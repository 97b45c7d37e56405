"""`accelerate launch train/….py` as users run it: what it leaves, and that batches and interruptions change nothing."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepfuse.fuse.diffusion.variance import LearnedSchedule
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.train.checkpoints import read_state
from tests.fixtures_training import as_flags, launch_command, save_tiny_pipeline, train_here

REPOSITORY = Path(__file__).parents[1]
RANK, ALPHA = 4, 7
COMMON = {
    "prompts": "prompts.txt",
    "seed": 3,
    "sample_num_steps": 3,
    "sample_guidance_scale": 2.0,
    "num_validation_images": 3,
    "rank": RANK,
    "lora_alpha": ALPHA,
    "learning_rate": 0.01,
    # Adam's first steps are g / (|g| + ε): with a tiny ε they would blow the rounding of the smallest
    # gradients up to whole steps, and no two splits of a batch would agree.
    "adam_epsilon": 1e-3,
    "reward": "slope.py:slope",
    "pretrained_model_name_or_path": "pipeline",
}
DPO = COMMON | {
    "num_candidates": 2,
    "beta": 0.1,
    "variance": "learned",
    "variance_knots": 3,
    "lr_scheduler": "cosine",
    "max_train_steps": 4,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 3,
}
DDPO = COMMON | {"num_generations": 4, "beta": 0.1, "max_train_steps": 2, "checkpointing_steps": 1}

SLOPE = """
def slope(images, prompts):
    \"\"\"Smooth in the pixels, and other for other prompts.\"\"\"
    return (images[:, 0, :, :8] - images[:, 2, :, 8:]).mean((1, 2)) * images.new_tensor([len(p) for p in prompts])
"""
PROMPTS = ["a red apple", "a cat", "a boat on a blue background", "two keys", "a green tree"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a tiny base, prompts and a reward; runs are started in it."""
    folder = tmp_path_factory.mktemp("desk")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "slope.py").write_text(SLOPE)
    return folder


@pytest.fixture(scope="module")
def dpo(desk):
    """Launched, as users do; what else is trained here is trained in this process, which has imported all of it."""
    (desk / "dpo.yaml").write_text(yaml.safe_dump(DPO))
    own = as_flags({"config": "dpo.yaml", "output_dir": "dpo", "train_batch_size": 8})
    command = launch_command(REPOSITORY / "train" / "dpo.py", *own)
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return desk / "dpo"


@pytest.fixture(scope="module")
def ddpo(desk):
    return train_here(desk, "ddpo", DDPO, "ddpo", train_batch_size=8)


def tensors(folder):
    """The policy after each kept checkpoint, and the adapter."""
    files = [*sorted(folder.glob("checkpoint-*/policy.safetensors")), folder / "pytorch_lora_weights.safetensors"]
    return {str(file.relative_to(folder)): read_state(file) for file in files}


def base_of(desk):
    pipeline = StableDiffusionPipeline.from_pretrained(desk / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# However the batch is split


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpo", "ddpo"])
def test_eight_micro_batches_of_one_are_one_batch_of_eight(desk, algorithm, request):
    whole = request.getfixturevalue(algorithm)
    settings = {"dpo": DPO, "ddpo": DDPO}[algorithm] | {"train_batch_size": 1, "gradient_accumulation_steps": 8}
    split = train_here(desk, algorithm, settings, f"{algorithm}-split")
    expected, found = tensors(whole), tensors(split)
    assert "checkpoint-2/policy.safetensors" in expected
    assert expected.keys() == found.keys()
    for file, state in expected.items():
        assert state.keys() == found[file].keys()
        for name, value in state.items():
            torch.testing.assert_close(found[file][name], value, rtol=0, atol=1e-5, msg=f"{file}: {name}")
    # B starts at 0, so this is how far training went
    learned = expected["checkpoint-2/policy.safetensors"]
    assert max(value.abs().max() for name, value in learned.items() if "lora_B" in name) > 1e-3
    # Adam and clipping hide the scale of a gradient; what was logged of it does not
    for tag in ("loss", "kl", "reward", "gradient_norm", *(["kept_pairs"] if algorithm == "dpo" else [])):
        logged, of_split = ([e.value for e in events(folder).Scalars(tag)] for folder in (whole, split))
        assert of_split == pytest.approx(logged, rel=1e-3, abs=1e-5), tag


# Interruption


def test_a_run_cut_off_after_two_steps_and_resumed_ends_where_the_whole_run_did(desk, dpo):
    output = desk / "resumed"
    output.mkdir()
    shutil.copytree(dpo / "checkpoint-2", output / "checkpoint-2")
    train_here(desk, "dpo", DPO, "resumed", train_batch_size=8, resume_from_checkpoint="latest")
    expected, found = tensors(dpo), tensors(output)
    assert expected.keys() == found.keys()
    for file, state in expected.items():
        for name, value in state.items():
            assert torch.equal(found[file][name], value), f"{file}: {name}"
    before, after = (read_state(dpo / f"checkpoint-{step}" / "policy.safetensors") for step in (2, 4))
    assert all(not torch.equal(before[name], after[name]) for name in before)  # it had something to resume
    assert read_adapter(output).objective.variance.offsets.tolist() == after["variance_offsets"].tolist()
    assert json.loads((output / "checkpoint-4" / "progress.json").read_text())["step"] == 4


def test_no_more_checkpoints_are_kept_than_asked_for(dpo):
    assert sorted(p.name for p in dpo.glob("checkpoint*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


# What it leaves


def test_plain_diffusers_reads_the_adapter(desk, dpo):
    pipeline = base_of(desk)
    plain = {name: module.weight.clone() for name, module in pipeline.unet.named_modules() if name.endswith("to_q")}
    pipeline.load_lora_weights(dpo, adapter_name="slope")
    assert {m.scaling["slope"] for m in pipeline.unet.modules() if isinstance(m, BaseTunerLayer)} == {1}
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name="slope")
    trained = read_state(dpo / "checkpoint-4" / "policy.safetensors")
    assert loaded.keys() == trained.keys() - {"variance_offsets"}
    for name, value in loaded.items():  # the scale is in B
        torch.testing.assert_close(value, trained[name] * (ALPHA / RANK if "lora_B" in name else 1), rtol=1e-6, atol=0)
    # W + (α / r) B A, which is what it was trained as
    pipeline.fuse_lora(adapter_names=["slope"])
    assert len(plain) > 0
    for name, weight in plain.items():
        a, b = (trained[f"{name}.lora_{factor}.weight"] for factor in "AB")
        fused = pipeline.unet.get_submodule(name).base_layer.weight
        torch.testing.assert_close(fused, weight + ALPHA / RANK * b @ a, rtol=0, atol=1e-6)
        assert (fused - weight).abs().max() > 1e-5


def test_adapter_folder_records_how_it_was_trained(desk, dpo):
    adapter = read_adapter(dpo)
    assert (adapter.name, adapter.objective.reward, adapter.objective.beta) == ("slope", "slope.py:slope", 0.1)
    assert (adapter.guidance, adapter.guidance_scale, adapter.num_inference_steps) == ("shared", 2.0, 3)
    assert isinstance(adapter.objective.variance, LearnedSchedule)
    assert (adapter.record["algorithm"], adapter.record["steps"]) == ("dpo", 4)
    assert adapter.record["config"] == yaml.safe_load((dpo / "config.yaml").read_text())
    assert DPO.items() <= adapter.record["config"].items()


def test_validation_before_and_after_is_the_reward_of_the_images_drawn(dpo):
    before, after = (read_adapter(dpo).record["validation"][when] for when in ("before", "after"))
    assert before["images"] == after["images"] == 3
    assert before["reward"] != after["reward"]
    log = events(dpo)
    assert [e.step for e in log.Scalars("validation_reward")] == [0, 4]
    values = [e.value for e in log.Scalars("validation_reward")]
    assert values == pytest.approx([before["reward"], after["reward"]], rel=1e-6)


def events(folder):
    (file,) = folder.glob("logs/stepfuse/events.out.tfevents.*")
    log = EventAccumulator(str(file))
    log.Reload()
    return log


@pytest.mark.parametrize(("algorithm", "steps"), [("dpo", 4), ("ddpo", 2)])
def test_tensorboard_has_every_step(algorithm, steps, request):
    log = events(request.getfixturevalue(algorithm))
    for tag in ("loss", "kl", "reward", "gradient_norm", "learning_rate"):
        assert [e.step for e in log.Scalars(tag)] == list(range(1, steps + 1))
    kl = [e.value for e in log.Scalars("kl")]
    assert kl[0] == 0  # measured before the first update, of a policy that is its reference
    assert kl[-1] > 0
    loss = [e.value for e in log.Scalars("loss")]
    if algorithm == "dpo":
        assert loss[0] == pytest.approx(math.log(2), rel=1e-6)
    else:  # every ratio is 1 and advantages sum to 0, so β KL alone is left: the mean of its 3 denoising steps
        assert loss == pytest.approx([0.1 * value / 3 for value in kl], abs=1e-5)


@pytest.mark.parametrize(("algorithm", "steps"), [("dpo", 4), ("ddpo", 2)])
def test_sample_images_are_drawn_before_and_after(algorithm, steps, request):
    folder = request.getfixturevalue(algorithm) / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000.png", f"step-{steps:06d}.png"]
    before, after = (Image.open(p) for p in sorted(folder.iterdir()))
    assert before.size == after.size
    assert before.tobytes() != after.tobytes()
