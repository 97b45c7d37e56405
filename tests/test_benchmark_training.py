"""The benchmark of training: what it counts, measures and keeps."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.scripts.baselines.ddpo_pytorch import DDPOPyTorch
from stepfuse.scripts.benchmark import harness, memory, models, training
from stepfuse.scripts.benchmark.harness import Measured
from stepfuse.scripts.benchmark.models import with_copied_network
from stepfuse.scripts.benchmark.settings import TrainingBenchmark
from stepfuse.scripts.benchmark.training import benchmark_training, memory_of, rows_of, training_table
from stepfuse.scripts.benchmark.training_methods import Row
from stepfuse.scripts.cli.main import main
from tests.fixtures_training import forget_accelerator

IMAGES, STEPS, CANDIDATES = 3, 5, 2
SKIPPED = 1  # a fifth of the steps
pytestmark = pytest.mark.usefixtures("own_accelerator")


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_pipeline(str(tiny_base))


@pytest.fixture(scope="module")
def settings():
    return TrainingBenchmark(images=IMAGES, steps=STEPS, candidates=CANDIDATES, repeats=2, memory=False)


# Models.


def test_a_unet_of_its_own_shares_frozen_weights_and_keeps_its_lora_to_itself(base):
    one = with_copied_network(base)
    pointers = {parameter.data_ptr() for parameter in base.unet.parameters()}
    assert {parameter.data_ptr() for parameter in one.unet.parameters()} == pointers
    one.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert not any("lora" in name for name, _ in base.unet.named_parameters())
    assert one.vae is base.vae


def test_a_pipeline_of_random_weights_has_the_published_numbers_of_parameters():
    """Of the autoencoder 83,653,863; of the text encoders 123,060,480 and, of XL, 694,659,840 beside it."""
    with torch.device("meta"):
        parts = [
            *(AutoencoderKL(**models.AUTOENCODERS[name]) for name in ("sd15", "sdxl")),
            CLIPTextModel(CLIPTextConfig(**models.TEXT_ENCODER)),
            CLIPTextModelWithProjection(CLIPTextConfig(**models.SECOND_TEXT_ENCODER)),
        ]
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [83_653_863, 83_653_863, 123_060_480, 694_659_840]


# What is measured.


@pytest.fixture(scope="module")
def results(base, settings):
    """Of the small pipeline in the place of any model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "base_pipeline", lambda settings: base)
        forget_accelerator()
        return benchmark_training(replace(settings, timestep_fraction=0.4))


def test_rows_through_unets_are_counted_not_said(results):
    """Of an image, with T steps, k candidates and none in the first m steps: all, and those with a gradient.

    ddpo-pytorch: 2 a step, and 2 a learned step with gradient. Ours: 2 a step, of the base and of the policy, 1 for the
    reference of a learned step where the loss has a KL, and 1 a learned step with gradient.
    SPO: 2 at each of the first m + 1 steps, 2 k at those after them, and for a pair 4 of the policy and 4 of the
    reference. Ours draws as SPO does; for a pair 1 of the base and 1 of the policy.
    """
    T, k, m = STEPS, CANDIDATES, SKIPPED
    drawn = 2 * (m + 1) + 2 * k * (T - m - 1)
    counted = {
        (row["algorithm"], row["name"]): (row["rows_an_image"], row["gradient_rows_an_image"])
        for row in results["rows"]
    }
    counted.pop(("dpo", "stepfuse, 0.4 of the steps"))  # depends on which steps are drawn
    assert counted == {
        ("ddpo", "ddpo-pytorch"): (2 * T + 2 * T, 2 * T),
        ("ddpo", "stepfuse"): (3 * T + T, T),
        ("ddpo", "stepfuse, no KL"): (2 * T + T, T),
        ("ddpo", "ddpo-pytorch, 0.4 of the steps"): (2 * T + 2 * 2, 2 * 2),
        ("ddpo", "stepfuse, 0.4 of the steps"): (2 * T + 2 + 2, 2),
        ("dpo", "SPO"): (drawn + 8 * (T - m), 4 * (T - m)),
        ("dpo", "stepfuse"): (drawn + 2 * (T - m), T - m),
    }


def test_ratios_are_of_the_same_round_and_their_median_lies_within_their_range(results):
    rows = {(row["algorithm"], row["name"]): row for row in results["rows"]}
    baseline = rows["dpo", "SPO"]["seconds"]
    own = rows["dpo", "stepfuse"]
    ratios = [a / b for a, b in zip(baseline, own["seconds"], strict=True)]
    assert len(ratios) == 2
    assert (own["ratio"], own["ratio_min"], own["ratio_max"]) == (sum(ratios) / 2, min(ratios), max(ratios))
    assert own["images_per_second"] == pytest.approx(2 * IMAGES / sum(own["seconds"]))
    assert {rows[key]["ratio"] for key in (("dpo", "SPO"), ("ddpo", "ddpo-pytorch"))} == {1}


def test_results_say_what_they_are_of(results):
    assert torch.__version__ in results["machine"]
    assert results["libraries"]["torch"] == torch.__version__
    assert results["settings"]["skip_first_steps"] == SKIPPED
    assert results["skipped"] == {}
    assert json.loads(json.dumps(results, allow_nan=False)) == json.loads(json.dumps(results))


def test_the_table_has_a_line_a_row(results):
    lines = training_table(results).splitlines()
    assert len(lines) == 2 + len(results["rows"])
    (row,) = [row for row in results["rows"] if row["name"] == "SPO"]
    assert lines[2 + results["rows"].index(row)].startswith(f"| dpo | SPO | {row['images_per_second']:.3g} | 1.00 | ")
    assert lines[-1].endswith("| – |")  # no memory


def test_what_does_not_fit_is_left_out_and_said(base, settings, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e3)
    monkeypatch.setattr(DDPOPyTorch, "learn", full)
    measured = benchmark_training(replace(settings, steps=2, repeats=1))
    assert [(row["way"], row["ratio"]) for row in measured["rows"]] == [("stepfuse", None)] * 3
    assert measured["skipped"]["ddpo, ddpo-pytorch"] == "out of memory"
    assert "dpo, SPO: left out, copies of the network take 0.0 GB" in training_table(measured)


def test_without_a_checkout_ours_is_measured_alone(base, settings, monkeypatch, capsys):
    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(harness, "has_baselines", lambda: False)
    measured = benchmark_training(replace(settings, algorithms=("dpo",), steps=2, repeats=1))
    assert [(row["way"], row["ratio"]) for row in measured["rows"]] == [("stepfuse", None)]
    assert capsys.readouterr().err.startswith("SPO: left out, comparing")


def test_another_error_is_no_matter_of_memory(base, settings, monkeypatch):
    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(DDPOPyTorch, "learn", lambda self, samples: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        benchmark_training(replace(settings, steps=2, repeats=1))


def test_rows_are_the_baseline_and_ours_and_what_else_is_asked_for(settings):
    rows = rows_of(replace(settings, timestep_fraction=0.5, timesteps_per_forward=2, compile="regional"))
    assert [str(row) for row in rows] == [
        "ddpo, ddpo-pytorch",
        "ddpo, stepfuse",
        "ddpo, stepfuse, no KL",
        "ddpo, stepfuse, 2 steps a forward",
        "ddpo, stepfuse, no KL, 2 steps a forward",
        "ddpo, ddpo-pytorch, 0.5 of the steps",
        "ddpo, stepfuse, 0.5 of the steps, 2 steps a forward",
        "ddpo, stepfuse, regional compile",
        "dpo, SPO",
        "dpo, stepfuse",
        "dpo, stepfuse, 2 steps a forward",
        "dpo, stepfuse, 0.5 of the steps, 2 steps a forward",
        "dpo, stepfuse, regional compile",
    ]


def test_a_compiled_row_takes_its_count_from_the_one_that_is_not():
    eager, compiled = Row("ddpo", "stepfuse"), Row("ddpo", "stepfuse", compile="full")
    seconds = {eager: [2.0], compiled: [1.0]}
    measured = Measured(seconds=seconds, batch_rows={eager: (20, 5), compiled: (0, 0)})
    entry = training._entry(compiled, measured, TrainingBenchmark(images=5))
    assert (entry["rows_an_image"], entry["gradient_rows_an_image"]) == (4, 1)


def test_one_image_and_half_precision_can_be_measured(base, settings, monkeypatch):
    half = load_pipeline(base.name_or_path, dtype=torch.bfloat16)
    monkeypatch.setattr(training, "base_pipeline", lambda settings: half)
    one = replace(settings, images=1, steps=2, repeats=1, dtype="bfloat16", gradient_checkpointing=True)
    assert len(benchmark_training(one)["rows"]) == 5


def test_memory_is_of_a_process_of_its_own_and_reported_after_the_times(base, settings, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "base_pipeline", lambda settings: base)
    monkeypatch.setattr(training, "rows_of", lambda settings: [Row("ddpo", "ddpo-pytorch")])  # seconds each
    small = replace(settings, images=1, steps=1, repeats=1, memory=True)
    benchmark_training(small, report=lambda r: seen.append(r["rows"][0]["peak_memory_mb"]))
    assert seen[0] is None
    assert seen[1] > 50  # MB, of the bundled base: the other process knows no other


def test_training_by_the_benchmark_leaves_nothing_behind(base, settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "base_pipeline", lambda settings: with_copied_network(base))
    for row in rows_of(settings):
        forget_accelerator()
        assert memory_of(replace(settings, steps=2), row)["peak_memory_mb"] > 0
    assert list(tmp_path.iterdir()) == []


# The command.


def test_the_command_writes_the_results_and_prints_the_table(tmp_path, capsys):
    output = tmp_path / "new" / "training.json"
    small = "--algorithms dpo --images 1 --steps 2 --candidates 2 --repeats 1 --no_memory"
    main(f"benchmark training {small} --device cpu --output {output}".split())
    results = json.loads(output.read_text())
    assert training_table(results) in capsys.readouterr().out
    assert (results["settings"]["model"], results["settings"]["candidates"]) == ("emoji", 2)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ("--model sd3", "'sd3'"),
        ("--algorithms grpo", "'grpo'"),
        ("--algorithms ,", "algorithms"),
        ("--images 0", "images 0"),
        ("--steps 0", "steps 0"),
        ("--repeats 0", "repeats 0"),
        ("--candidates 1", "candidates 1"),
        ("--threads 0", "threads 0"),
        ("--timestep_fraction 0", "timestep_fraction 0"),
        ("--timesteps_per_forward 0", "timesteps_per_forward 0"),
        ("--dtype float16", "float16"),
        ("--resolution 100", "100"),
        ("--steps 2000", "2000"),
    ],
)
def test_what_cannot_be_measured_is_named_and_nothing_is_written(tmp_path, options, culprit):
    output = tmp_path / "training.json"
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "training", *options.split(), "--device", "cpu", "--output", str(output)])
    assert re.fullmatch(r"error: [^\n]+", str(stop.value.code))
    assert culprit in stop.value.code
    assert not output.exists()


def test_results_that_are_there_are_kept(tmp_path):
    output = tmp_path / "training.json"
    output.write_text("mine")
    with pytest.raises(SystemExit, match="exists"):
        main(["benchmark", "training", "--output", str(output)])
    assert output.read_text() == "mine"
