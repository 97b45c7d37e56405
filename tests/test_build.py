"""`stepfuse build`: one command from rewards to a set with a card; what is done is not done again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from stepfuse.data.run_lock import locked
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import card
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.recipes.build_set import BuildConfig, assemble, read_build
from stepfuse.scripts.recipes.training import Training
from stepfuse.train.provenance import config_hash
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_tiny import refused
from tests.fixtures_training import save_tiny_pipeline

ROOT = Path(__file__).parents[1]
COMMON = {
    "pretrained_model_name_or_path": "pipeline",
    "prompts": "prompts.txt",
    "report_to": "none",
    "sample_num_steps": 3,
    "guidance": "off",
    "num_validation_images": 2,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "learning_rate": 0.01,
    "beta": 0.1,
}
BUILD = {
    "output_dir": "out",
    "objectives": [
        {"algorithm": "ddpo", "config": "ddpo.yaml", "objective_name": "small"},
        {"algorithm": "dpo", "config": "dpo.yaml"},
    ],
    "oracles": [
        {
            "algorithm": "ddpo",
            "config": "ddpo.yaml",
            "objective_name": "both",
            "reward": "weighted:1*compressibility/0.2 + 1*colourfulness/5",
        }
    ],
    "profile": "prompts.txt",
    "evaluate": "eval.yaml",
}
EVALUATION = {
    "prompts": "prompts.txt",
    "seeds_per_prompt": 2,
    "rules": ["product", "soup", "oracle"],
    "grid": 2,
    "steps": 3,
    "scales": {"small": 0.2, "colour": 5.0},
    "strip_prompts": 1,
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("a red apple\na cat\ntwo keys\n")
    ddpo = COMMON | {"reward": "compressibility", "num_generations": 4}
    dpo = COMMON | {"reward": "colourfulness", "objective_name": "colour", "num_candidates": 2}
    for name, values in {"ddpo": ddpo, "dpo": dpo, "build": BUILD, "eval": EVALUATION}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(autouse=True)
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


COMMAND = [sys.executable, "-m", "stepfuse.scripts.cli.main", "build", "build.yaml"]


def build(capsys):
    capsys.readouterr()
    main(COMMAND[3:])  # in this process, which saves the imports of another
    return capsys.readouterr().out.splitlines()


def adapters():
    return {folder.name.rpartition("-")[0]: folder for folder in Path("out/adapters").iterdir() if folder.is_dir()}


@pytest.mark.slow
def test_one_command_trains_fuses_measures_and_goes_on_where_it_was_interrupted(desk, capsys):
    # Killed with its trainings while the second objective is trained.
    first = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 200
    while not list(Path("out/adapters").glob("colour-*/config.yaml")):
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    small = next(Path("out/adapters").glob("small-*/objective.json"))
    finished = small.stat().st_mtime_ns

    lines = build(capsys)
    assert [line.split(":")[0] for line in lines if line.startswith("[")] == [
        "[1/3] small",
        "[2/3] colour",
        "[3/3] both",
    ]
    assert "done" in lines[0]
    assert small.stat().st_mtime_ns == finished
    loaded = load_set("out/set")
    assert loaded.names == ["small", "colour"]
    assert [oracle.adapter.name for oracle in loaded.oracles] == ["both"]
    assert len(loaded.profiles) == 1
    for name, folder in adapters().items():
        record = read_adapter(folder).record
        assert record["steps"] == 2
        assert record["config_sha256"].startswith(folder.name.rpartition("-")[2])
        assert list(record["inputs"]) == ["prompts.txt"], name

    # The card has the evaluation's own figures.
    (evaluation,) = Path("out").glob("evaluation-*")
    summary = json.loads((evaluation / "summary.json").read_text())
    text = Path("out/set/README.md").read_text()
    cell = next(c for c in summary["cells"] if c["rule"] == "product" and "0.5" in c["weights"])
    for reward in ("compressibility", "colourfulness"):
        assert f"{cell['rewards'][reward]['gain']['mean']:+.3g} [" in text
    assert "| both | oracle of small 0.5 · colour 0.5 |" in text
    assert "](strip.png)" in text
    with Image.open("out/set/strip.png") as strip:
        assert strip.width > 4 * 64  # the base, two adapters and their mixture
    assert Path("out/set/fronts.png").read_bytes() == (evaluation / "fronts.png").read_bytes()

    # Nothing is done twice.
    begun = time.monotonic()
    before = {file: file.stat().st_mtime_ns for file in Path("out/adapters").rglob("*")}
    lines = build(capsys)
    assert all("done" in line for line in lines if line.startswith("["))
    assert not [line for line in lines if line.startswith(("set:", "profile:"))]
    assert {file: file.stat().st_mtime_ns for file in Path("out/adapters").rglob("*")} == before
    assert time.monotonic() - begun < 120

    # What changes is trained anew beside what was, and the rest stays.
    values = yaml.safe_load(Path("build.yaml").read_text())
    values["objectives"][1]["learning_rate"] = 0.02
    values.pop("evaluate")
    Path("build.yaml").write_text(yaml.safe_dump(values))
    lines = [line for line in build(capsys) if line.startswith(("[", "set:"))]
    assert ["done" in line for line in lines] == [True, False, True, False]
    assert len(list(Path("out/adapters").glob("colour-*/objective.json"))) == 2
    assert load_set("out/set").adapters[1].record["config"]["learning_rate"] == 0.02
    assert "No evaluation was made of this set." in Path("out/set/README.md").read_text()


# Bad input, found before anything is trained


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"objectives": []}, "objectives is []"),
        ({"objectives": ["ddpo.yaml"]}, "an objective is ddpo.yaml; expected a mapping with `algorithm` and `config`"),
        ({"objectives": [{"algorithm": "ppo", "config": "ddpo.yaml"}]}, "algorithm is ppo; expected one of dpo, ddpo"),
        ({"objectives": [{"algorithm": "ddpo", "config": "no.yaml"}]}, "no config file 'no.yaml'"),
        ({"objectives": [{"algorithm": "ddpo", "config": "ddpo.yaml", "rnak": 2}]}, "did you mean 'rank'?"),
        ({"objectives": [{"algorithm": "ddpo", "config": "ddpo.yaml", "rank": 0}]}, "rank is 0; expected 1 or more"),
        ({"objectives": [BUILD["objectives"][0]] * 2}, "objective_name is small"),
        (
            {"objectives": [*BUILD["objectives"][:1], BUILD["objectives"][1] | {"guidance": "shared"}]},
            "guidance of colour is shared; expected off, as small has it",
        ),
        (
            {"objectives": [*BUILD["objectives"][:1], BUILD["objectives"][1] | {"max_sequence_length": 8}]},
            "max_sequence_length of colour is 8; expected None, as small has it",
        ),
        (
            {"objectives": [*BUILD["objectives"][:1], BUILD["objectives"][1] | {"resolution": 128}]},
            "resolution of colour is 128; expected None, as small has it",
        ),
        ({"guidance": "shared"}, "guidance_scale is None; expected the scale of guidance shared, for small is trained"),
        ({"dtype": "float64"}, "dtype is 'float64'; expected one of float32, float16, bfloat16"),
        ({"evaluate": "no.yaml"}, "no config file 'no.yaml'"),
        ({"accelerate": "no.yaml"}, "no config file 'no.yaml'"),
        ({"profile": "nowhere"}, "no prompts 'nowhere'"),
        ({"reference_eta": 1.5}, "wrong.yaml: reference_eta is 1.5; expected a number in [0, 1]"),
        ({"ouput_dir": "x"}, "did you mean 'output_dir'?"),
    ],
)
def test_a_build_that_cannot_work_is_named_before_anything_is_trained(tmp_path, change, culprit):
    Path("wrong.yaml").write_text(yaml.safe_dump(BUILD | {"output_dir": str(tmp_path / "out")} | change))
    with refused(culprit):
        read_build(Path("wrong.yaml"))
    with pytest.raises(SystemExit) as error:
        main(["build", "wrong.yaml"])
    assert str(error.value.code).startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_second_build_in_one_folder_is_refused(tmp_path):
    Path("held.yaml").write_text(yaml.safe_dump(BUILD | {"output_dir": str(tmp_path / "out")}))
    with locked(tmp_path / "out"), pytest.raises(SystemExit) as error:
        main(["build", "held.yaml"])
    assert "is in use by process" in str(error.value.code)


def test_damaged_weights_of_a_set_that_stays_are_noticed(adapters, tmp_path):
    trainings = [Training(settings=DPOSettings(), folder=adapters / "a")]
    output = tmp_path / "out" / "set"
    assemble(output, BuildConfig(objectives=[{}]), trainings, [])
    assert assemble(output, BuildConfig(objectives=[{}]), trainings, []).names == ["a"]
    weights = output / "a" / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # within the last tensor
    with refused(str(weights), "sha256"):
        assemble(output, BuildConfig(objectives=[{}]), trainings, [])


def test_a_set_is_made_anew_where_its_guidance_changes(adapters, tmp_path):
    trainings = [Training(settings=DPOSettings(), folder=adapters / "a")]
    for scale, changes in ((None, {}), (2.0, {"guidance_scale": 2.0}), (4.0, {"guidance_scale": 4.0})):
        made = assemble(tmp_path / "out" / "set", BuildConfig(objectives=[{}], **changes), trainings, [])
        assert (made.guidance, made.guidance_scale) == ("shared", scale or 3.0)


def test_a_set_that_was_not_built_here_is_not_replaced(adapters, tmp_path):
    config = BuildConfig(objectives=[{}])
    trainings = [Training(settings=DPOSettings(), folder=adapters / "a")]
    output = tmp_path / "out" / "set"
    assert assemble(output, config, trainings, []).names == ["a"]
    made = output.with_name("set-of.json")
    made.write_text("{}")  # as a build that was killed leaves it
    assert assemble(output, config, trainings, []).names == ["a"]
    made.unlink()
    with refused(str(output), "not built here"):
        assemble(output, config, trainings, [])
    Path("strange.yaml").write_text(yaml.safe_dump(BUILD | {"output_dir": str(output.parent)}))
    with pytest.raises(SystemExit, match="not built here"):  # before anything is trained
        main(["build", "strange.yaml"])


# What decides that an adapter is made anew


def test_the_hash_of_a_run_is_what_it_was_before_settings_were_added():
    """A new setting goes into `ADDED` with what runs did before, or every adapter of a set would be made anew."""
    assert config_hash(DPOSettings()).startswith("4b4dc5eb0ebe5f1a")
    assert config_hash(DDPOSettings()).startswith("b707fcba7fce520f")


def test_a_hash_is_of_what_decides_the_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    Path("mine.py").write_text("def reward(images, prompts): ...\n")
    settings = dict(prompts="prompts.txt", reward="mine.py:reward")
    first = config_hash(DPOSettings(**settings))
    aside = dict(output_dir="elsewhere", resume_from_checkpoint="latest", report_to="none", overwrite=True)
    assert config_hash(DPOSettings(**settings, **aside)) == first
    assert config_hash(DPOSettings(**settings, learning_rate=2e-4)) != first
    assert config_hash(DPOSettings(**settings, seed=1)) != first
    assert config_hash(DDPOSettings(**settings)) != first
    for reward in ("mine.py:reward", "weighted:0.5*mine.py:reward/2 + 0.5*colourfulness"):
        before = config_hash(DPOSettings(**settings | {"reward": reward}))
        for file in ("prompts.txt", "mine.py"):
            Path(file).write_text(Path(file).read_text() + "\n")
            now = config_hash(DPOSettings(**settings | {"reward": reward}))
            assert now != before
            before = now


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sets").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_build_that_is_shipped_is_sound(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("stepfuse.scripts.recipes.build_set.load_prompts", lambda name: [name])  # some are of the hub
    config, objectives, oracles, _ = read_build(file)
    assert f"stepfuse build sets/{file.stem}\n" in file.read_text()
    assert len(objectives) == len(config.objectives)
    assert sum(len(training.names) for training in objectives) >= 2
    weighted = [training.settings.reward for training in oracles]
    assert all(reward.startswith("weighted:") for reward in weighted)
    etas = {training.settings.sample_eta for training in objectives}
    assert config.reference_eta in etas, "the base would have another variance than every adapter"


def test_a_card_says_what_is_not_known(tmp_path):
    loaded = load_set("emoji")
    assert "No evaluation was made" not in card(loaded, source="emoji", shown=[])
    text = card(replace(loaded, evaluation=None), source="emoji", shown=[])
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front  # the bundled base has no hub id
    assert "No evaluation was made of this set." in text
    for adapter in loaded.adapters:
        assert f"| {adapter.name} | `{adapter.objective.reward}` | {adapter.record['algorithm'].upper()}, " in text
    code = text.split("```python")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (64, 64)
    assert isinstance(names["pipe"].components["unet"], torch.nn.Module)


def test_a_build_names_packaged_configurations_and_the_nearest_is_suggested(tmp_path):
    file = tmp_path / "mine.yaml"
    build = {"objectives": [{"algorithm": "dpo", "config": "dpo/emoji-alignment"}], "evaluate": "eval/emoji"}
    file.write_text(yaml.safe_dump(build))
    _, (training,), _, evaluation = read_build(file)
    assert training.settings.name == "alignment"
    assert evaluation is not None
    file.write_text(yaml.safe_dump(build | {"evaluate": "eval/emogi"}))
    with refused("mine.yaml", "'eval/emoji'"):
        read_build(file)
    file.write_text(yaml.safe_dump({"objectives": [{"algorithm": "dop", "config": "dpo/emoji-alignment"}]}))
    with refused("dop", "'dpo'"):
        read_build(file)
