"""Whole runs with several objectives: their folders and records, resuming, the best checkpoint, and faulty rewards."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.train.checkpoints import read_state
from tests.fixtures_tiny import read_lora
from tests.fixtures_training import refused_by

REWARDS = """
calls = 0

def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))

def flat(images, prompts):
    return -images.std((1, 2, 3))

def faulty(images, prompts):
    # three points of validation, and then a call a step: the fifth is of step 2
    global calls
    calls += 1
    values = flat(images, prompts)
    if calls == 5:
        values[1] = float("nan")
    return values

def faulty_candidate(images, prompts):
    global calls
    calls += len(images) == 8
    values = flat(images, prompts)
    if calls == 2 and len(images) == 8:
        values[3] = float("nan")
    return values
"""
WEIGHTS = "pytorch_lora_weights.safetensors"
SLOPE, FLAT = dict(reward="rewards.py:slope"), dict(reward="rewards.py:flat", objective_name="calm")
OWN = dict(rank=2, beta=0.3, variance="learned", variance_knots=3)


@pytest.fixture
def run_joint(run_training):
    """main() of train/ with two objectives, which differ in all that they may differ in."""

    def run(algorithm="ddpo", first=SLOPE, second=FLAT | OWN, **flags):
        Path("joint.yaml").write_text(yaml.safe_dump({"objectives": [first, second]}))
        run_training(algorithm, config="joint.yaml", **{"num_validation_images": 2} | flags)

    return run


def record(name, folder="out"):
    return read_adapter(Path(folder, name)).record


def lora(name, folder="out"):
    return read_lora(Path(folder, name, WEIGHTS))


def contents(folder):
    return {str(file): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(Path(folder, "logs", "stepfuse")))
    log.Reload()
    return {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in log.Tags()["scalars"]}


def test_each_objective_has_a_folder_with_its_adapter_and_its_record(run_joint, capsys):
    run_joint(max_train_steps=4, train_rule="product", report_to="tensorboard", vertex_share=1.0)
    assert not Path("out", "objective.json").exists()
    adapters = {name: read_adapter(Path("out", name)) for name in ("slope", "calm")}
    slope, calm = (adapter.record for adapter in adapters.values())
    assert [adapter.objective.beta for adapter in adapters.values()] == [0.1, 0.3]
    assert [{len(v) for k, v in lora(name).items() if "lora_A" in k} for name in adapters] == [{4}, {2}]
    assert [type(adapter.objective.variance).__name__ for adapter in adapters.values()] == [
        "EtaSchedule",
        "LearnedSchedule",
    ]
    assert adapters["calm"].objective.variance.offsets.abs().max() > 0  # they have learned
    assert (slope["config"]["reward"], slope["config"]["objectives"]) == ("rewards.py:slope", [])
    assert OWN.items() <= calm["config"].items()
    assert {"rewards.py"} < set(slope["inputs"]) == set(calm["inputs"])
    joint = dict(objectives=["slope", "calm"], rule="product", vertex_share=1.0, weight_concentration=1.0)
    written = yaml.safe_load(Path("out/config.yaml").read_text())
    assert [entry["reward"] for entry in written["objectives"]] == ["rewards.py:slope", "rewards.py:flat"]
    log = scalars("out")
    for name, own in (("slope", slope), ("calm", calm)):
        assert joint.items() <= own["joint"].items()
        # all weight on it: the KL of its last images, and its reward at its vertex
        assert own["kl"] == pytest.approx(log[f"kl/{name}"][4], rel=1e-5)
        assert own["kl"] == pytest.approx(sum(step["nats"] for step in own["kl_steps"]))
        for moment in ("before", "after"):
            points = own["joint"]["validation"][moment]["points"]
            assert set(points) == {"slope", "calm", "centre"}
            assert own["validation"][moment] == points[name][name]
            assert {len(of) for of in points.values()} == {2}
        assert own["joint"]["validation"]["after"]["points"]["centre"][name]["reward"] == pytest.approx(
            log[f"validation/centre/{name}"][4], rel=1e-5
        )
        assert set(log[f"reward/{name}"]) == {1, 2, 3, 4}
    assert slope["kl"] != calm["kl"]
    pictures = {path.name for path in Path("out/samples").iterdir()}
    assert pictures == {
        f"step-{step}-{point}.png" for step in ("000000", "000004") for point in ("slope", "calm", "centre")
    }
    printed = capsys.readouterr().out
    assert "adapter slope, step 4: out/slope" in printed
    assert "with equal weights, rule product" in printed


def test_resuming_goes_on_with_the_same_weights_and_ends_with_the_same_bits(run_joint):
    flags = dict(checkpointing_steps=2, load_best_model_at_end="true", num_inner_epochs=2)
    run_joint(max_train_steps=6, output_dir="straight", **flags)
    run_joint(max_train_steps=2, **flags)
    run_joint(max_train_steps=6, resume_from_checkpoint="latest", **flags)
    for name in ("slope", "calm"):
        straight, resumed = lora(name, "straight"), lora(name)
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())
        assert max(value.abs().max() for key, value in resumed.items() if "lora_B" in key) > 1e-3
        was, now = record(name, "straight"), record(name)
        assert was["best"]["step"] == was["steps"] in (2, 4, 6)
        for key in ("kl", "kl_steps", "validation", "joint", "best", "steps"):
            assert now[key] == was[key], key
    for file in ("policy.safetensors", "best.safetensors"):
        straight, resumed = load_file(f"straight/checkpoint-6/{file}"), load_file(f"out/checkpoint-6/{file}")
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_a_checkpoint_of_other_objectives_is_refused_by_their_names(run_joint, run_training):
    run_joint(max_train_steps=1, checkpointing_steps=1)
    before = contents("out")
    line = refused_by(run_joint, second=dict(reward="rewards.py:flat"), resume_from_checkpoint="latest")
    assert "the checkpoint has trained calm, slope, and the settings have flat, slope; resume with the same" in line
    line = refused_by(run_training, "ddpo", resume_from_checkpoint="latest")
    assert "the checkpoint has trained calm, slope, and the settings have one objective" in line
    assert contents("out") == before


def test_a_best_checkpoint_of_other_validation_images_is_written_without_a_gain(run_joint, capsys):
    """A run that resumes with another seed: its images cannot be compared with those before training."""
    flags = dict(checkpointing_steps=1, load_best_model_at_end="true")
    run_joint(max_train_steps=1, **flags)
    capsys.readouterr()
    run_joint(max_train_steps=2, seed=7, resume_from_checkpoint="latest", **flags)
    assert record("slope")["steps"] == record("calm")["best"]["step"] == 2
    assert "no gain: the images after were generated with another seed" in capsys.readouterr().out


def test_a_kl_beyond_its_limit_stops_all_and_the_best_checkpoint_becomes_the_adapters(run_joint):
    flags = dict(checkpointing_steps=1, checkpoints_total_limit=9, learning_rate=0.03, max_train_steps=8)
    run_joint(max_kl=0.5, **flags)
    slope, calm = record("slope"), record("calm")
    (entry,) = [entry for entry in slope["health"] if entry["what"].startswith("stopped")]
    assert entry["kl"] > 0.5
    assert slope["steps"] == calm["steps"] == slope["best"]["step"] < entry["step"] <= 8
    assert slope["joint"]["validation"]["after"] == slope["best"]["validation"]
    assert calm["validation"]["after"] == slope["best"]["validation"]["points"]["calm"]["calm"]
    best = read_state(Path(f"out/checkpoint-{slope['steps']}/policy.safetensors"))
    for name in ("slope", "calm"):
        state = {key.removeprefix(f"{name}/"): value for key, value in best.items() if key.startswith(f"{name}/")}
        found = lora(name)
        assert len(found) == len([key for key in state if not key.startswith("variance_")])
        assert all(torch.equal(value, state[key.removeprefix("unet.")]) for key, value in found.items())


# Folders that hold something


def test_overwriting_replaces_the_files_of_the_run_and_no_others(run_joint, run_training):
    run_joint(max_train_steps=1, checkpointing_steps=1)
    foreign = {"out/slope/notes.txt": b"mine", "out/other/objective.json": b"mine", "out/calm.txt": b"mine"}
    for name, text in foreign.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(text)
    kept = contents("out/slope")
    run_joint(max_train_steps=1, seed=1, overwrite="true")
    assert {name: Path(name).read_bytes() for name in foreign} == foreign
    assert not list_checkpoints(Path("out"))
    assert record("slope")["config"]["seed"] == 1
    assert contents("out/slope")[f"out/slope/{WEIGHTS}"] != kept[f"out/slope/{WEIGHTS}"]
    run_training("ddpo", max_train_steps=1, overwrite="true")  # of one objective: its folders are gone
    assert {str(path) for path in Path("out").rglob("objective.json")} == {
        "out/objective.json",
        "out/other/objective.json",
    }
    assert not Path("out/calm").exists()
    assert contents("out/slope") == {"out/slope/notes.txt": b"mine"}


@pytest.mark.parametrize("file", ["objective.json", WEIGHTS])
def test_files_of_other_origin_where_an_adapter_goes_are_refused(run_joint, file):
    Path("out/calm").mkdir(parents=True)
    Path("out/calm", file).write_text("mine")
    line = refused_by(run_joint, overwrite="true", max_train_steps=1)
    assert f"out holds calm/{file}, which is not part of what --overwrite replaces" in line
    assert contents("out") == {f"out/calm/{file}": b"mine"}


def test_overwriting_never_leaves_the_folder_whatever_its_configuration_says(run_joint):
    Path("objective.json").write_text("mine")
    Path("out").mkdir()
    values = dict(pretrained_model_name_or_path="x", output_dir="out", reward="clip_score")
    entries = [dict(objective_name=".."), dict(objective_name="/"), dict(objective_name=3), "text", dict(reward=1)]
    Path("out/config.yaml").write_text(yaml.safe_dump(values | {"objectives": entries}))
    run_joint(max_train_steps=1, overwrite="true")
    assert Path("objective.json").read_text() == "mine"


# Rewards that are not finite


def test_a_reward_that_is_not_finite_stops_the_run_and_names_itself(run_joint):
    line = refused_by(run_joint, second=FLAT | dict(reward="rewards.py:faulty"), max_train_steps=3)
    assert "step 2" in line
    assert "'rewards.py:faulty'" in line
    assert "nan" in line


@pytest.mark.parametrize(("algorithm", "reward"), [("ddpo", "faulty"), ("dpo", "faulty_candidate")])
def test_a_reward_that_is_not_finite_is_skipped_under_the_name_of_its_objective(run_joint, algorithm, reward):
    second = FLAT | OWN | dict(reward=f"rewards.py:{reward}")
    more = dict(num_candidates=2) if algorithm == "dpo" else {}
    run_joint(algorithm, second=second, nonfinite="skip", max_train_steps=3, **more)
    for name in ("slope", "calm"):
        (entry,) = record(name)["health"]
        assert entry["what"] == "skipped: a reward of calm that is not finite"
        assert len(entry["prompts"]) == 1
        assert all(torch.isfinite(value).all() for value in lora(name).values())
