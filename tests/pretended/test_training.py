"""Training on the device: every algorithm, precision and fusion, stopped and resumed; and its budget of waits."""

import io

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from stepfuse.fuse.sets.adapter import read_adapter
from tests.pretended.budget import TRAINED, check_budget, of_training, training_name
from tests.pretended.worlds import TWO, save_base

REWARDS = ""  # those of the catalogue
# A covering set: every algorithm in every precision, the scaler of float16 in all three, and both fusions.
RUNS = [
    ("ddpo", "no", "one"),
    ("ddpo", "fp16", "one"),
    ("ddpo", "bf16", "product"),
    ("dpo", "bf16", "one"),
    ("dpo", "fp16", "one"),
    ("dpo", "no", "soup"),
    *[("dpo", precision, "pairs") for precision in ("no", "bf16", "fp16")],
]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """datasets waits five seconds at the end of every pass, for threads that read ahead."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def save_pairs(file):
    def picture(colour):
        stream = io.BytesIO()
        Image.new("RGB", (20, 16), colour).save(stream, "PNG")
        return stream.getvalue()

    row = {"jpg_0": picture("red"), "jpg_1": picture("blue"), "label_0": 1.0, "caption": "a red apple"}
    Dataset.from_list([row] * 4).to_parquet(file)
    return file


@pytest.mark.parametrize(("algorithm", "precision", "trained"), RUNS, ids=map("-".join, RUNS))
def test_a_run_stops_and_goes_on(run_training, algorithm, precision, trained):
    flags = dict(mixed_precision=precision, train_batch_size=2, num_validation_images=1, sample_num_steps=2)
    if trained == "pairs":
        flags |= dict(pairs=save_pairs("pairs.parquet"), guidance="full", reward="colourfulness")
    elif trained == "one":
        flags |= dict(reward="colourfulness")
    else:
        with open("joint.yaml", "w") as file:
            yaml.safe_dump({"objectives": TWO, "train_rule": trained}, file)
        flags |= dict(config="joint.yaml")
    if algorithm == "dpo":
        flags |= dict(num_candidates=2)
    run_training(algorithm, max_train_steps=1, checkpointing_steps=1, **flags)
    run_training(algorithm, max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest", **flags)
    folders = ["out"] if trained in ("one", "pairs") else ["out/colourfulness", "out/compressibility"]
    for folder in folders:
        assert read_adapter(folder).record["steps"] == 2
        assert all(value.isfinite().all() for value in load_file(f"{folder}/pytorch_lora_weights.safetensors").values())


def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(run_training, monkeypatch):
    flags = dict(
        reward="colourfulness", train_batch_size=2, num_validation_images=1, sample_num_steps=2, max_train_steps=2
    )
    run_training("ddpo", output_dir="device", **flags)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_training("ddpo", output_dir="host", **flags)
    learned, expected = (load_file(f"{name}/pytorch_lora_weights.safetensors") for name in ("device", "host"))
    for name, value in expected.items():
        torch.testing.assert_close(learned[name], value, rtol=0, atol=1e-3)  # of steps of 0.01


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("algorithm", "run"), TRAINED, ids=map("-".join, TRAINED))
def test_training_makes_the_host_wait_as_often_as_the_budget_says(base, tmp_path, algorithm, run):
    for part, measured in of_training(base, tmp_path / "out", algorithm, run).items():
        check_budget(training_name(algorithm, run, part), measured)
