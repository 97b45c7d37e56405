"""What `stepfuse evaluate` refuses: before anything is drawn, midway, and of the output folder."""

import shutil

import pytest
import torch
import yaml

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sets.create import create_set
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.run import evaluate
from tests.fixtures_evaluated import CONFIG, PROMPTS, save_desk, table
from tests.fixtures_tiny import refused


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture(autouse=True)
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        (dict(rules=["sum"]), ["'sum'", "product"]),
        (dict(rules=[{"rule": "product", "candidates": 2}]), ["product", "'candidates'"]),
        (dict(rules=[{"weights": []}]), ["rules"]),
        (dict(rules=["product", "product"]), ["product a=1", "label"]),
        (dict(rules=[{"rule": "kl", "strengths": [3]}]), ["kl", "3"]),
        (dict(rules=["oracle"], grid=4), ["oracle a=0.75,b=0.25", "no oracle"]),
        (dict(rules=["rgg"]), ["rgg b=1", "compressibility"]),
        (dict(weights=["a=0.5", "b=0.5"]), ["a=0.5", "quotes"]),
        (dict(weights=["c=1"]), ["'c'"]),
        (dict(weights=[3]), ["3"]),
        (dict(rewards=["mystery"]), ["'mystery'"]),
        (dict(rewards=["rewards.py:broken"]), ["rewards.py:broken"]),
        (dict(judges=["mystery"]), ["'mystery'"]),
        (dict(judges=["emoji_background", "compressibility"]), ["judge 'compressibility'", "objective 'b'"]),
        (dict(rules=["oracle"], scales={"a": 1, "b": 1}), ["'mix'", "a: 5, b: 0.2", "a: 1, b: 1"]),
        (dict(rules=[{"rule": "soup", "label": "base"}]), ["soup", "'base'"]),
        (dict(rules=[{"rule": "soup", "label": "product"}]), ["soup", "'product'"]),
        (dict(rules=[{"rule": "soup", "strengths": []}]), ["soup", "strengths"]),
        (dict(rules=[{"rule": "soup", "weights": []}]), ["soup", "weights"]),
        (dict(rules=[{"rule": "rgg", "growth": "1e-2"}]), ["growth", "'1e-2'"]),
        (dict(rules=[{"rule": "product", 1: 2}]), ["product", "'1'"]),
        (dict(prompts="grounds.txt"), ["'a dog'", "background"]),
        (dict(scales={"a": 0, "b": 1}), ["scale of a"]),
        (dict(scales={"c": 1, "a": 1, "b": 1}), ["'c'"]),
        (dict(prompts="nowhere.txt"), ["nowhere.txt"]),
        (dict(prompts="prompts.txt:1"), ["2 or more"]),
        (dict(steps=0), ["0"]),
        (dict(guidance="sideways"), ["sideways"]),
    ],
)
def test_what_cannot_be_evaluated_is_named_and_nothing_is_written(desk, tmp_path, changes, culprits):
    (desk / "grounds.txt").write_text("\n".join([*PROMPTS, "a dog"]))
    (desk / "rewards.py").write_text("def broken(images, prompts):\n    return images.flatten(1).mean(1) / 0\n")
    with refused(*culprits):
        evaluate("set", EvaluationConfig(**CONFIG | changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_not_written_over_files_of_a_set(desk, tmp_path):
    shutil.copytree(desk / "plain", tmp_path / "set")
    (tmp_path / "set" / "fronts.png").write_text("the card's")
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    with refused("fronts.png"):
        evaluate(tmp_path / "set", EvaluationConfig(**CONFIG), tmp_path / "set", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change", [dict(base_schedule=EtaSchedule(eta=0.5)), dict(oracles=[])], ids=["reference", "oracles"]
)
def test_parts_of_another_set_are_not_gone_on_with(desk, tmp_path, change):
    """The adapters' weights are the same; what is fused with them is not."""
    config = EvaluationConfig(**CONFIG | dict(rules=["product"]))
    whole = dict(oracles=[desk / "mix"])
    create_set(tmp_path / "set", [desk / "a", desk / "b"], **whole)
    evaluate(tmp_path / "set", config, tmp_path / "out")
    create_set(tmp_path / "set", [desk / "a", desk / "b"], **whole | change, overwrite=True)
    with refused("another evaluation"):
        evaluate(tmp_path / "set", config, tmp_path / "out")
    create_set(tmp_path / "set", [desk / "a", desk / "b"], **whole, overwrite=True)
    with refused("another evaluation"):
        evaluate(tmp_path / "set", config, tmp_path / "out", dtype=torch.bfloat16)
    evaluate(tmp_path / "set", config, tmp_path / "out")


@pytest.mark.parametrize(
    ("body", "culprit"),
    [("return [][3]", "IndexError"), ("raise ValueError('a line\\nand another')", "a line and another")],
)
def test_a_reward_that_raises_is_one_line(desk, tmp_path, body, culprit):
    (desk / "raises.py").write_text(f"def raises(images, prompts):\n    {body}\n")
    with refused("'raises.py:raises'", culprit):
        evaluate("set", EvaluationConfig(**CONFIG | dict(rewards=["raises.py:raises"])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_midway_is_named_and_what_was_drawn_is_kept(desk, tmp_path):
    """It works on gray and on the first picture, then no more; mended, the run goes on."""
    (desk / "tired.py").write_text(
        "calls = 0\n\n\ndef tired(images, prompts):\n    global calls\n    calls += 1\n"
        "    return images.flatten(1).mean(1) * (1 if calls < 4 else float('nan'))\n"
    )
    config = EvaluationConfig(**CONFIG | dict(rules=["product"], rewards=["tired.py:tired"]))
    with refused("product", "tired.py:tired", "nan", "run again"):
        evaluate("set", config, tmp_path / "out")
    # One call was for the gray picture, so the second and third gave a batch each.
    assert len(list((tmp_path / "out" / "parts").glob("*.parquet"))) == 2
    (desk / "tired.py").write_text("def tired(images, prompts):\n    return images.flatten(1).mean(1)\n")
    evaluate("set", config, tmp_path / "out")
    assert len(table(tmp_path / "out")) == 4 * 6


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ([], "--config"),
        (["set"], "--config"),
        (["set", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["nowhere", "--config", "config.yaml"], "nowhere"),
        (["set", "--world", "gmm"], "--world"),
    ],
)
def test_the_command_names_what_is_missing(desk, arguments, culprit):
    (desk / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments, "--output_dir", "never"])
    assert culprit in str(stop.value)
    assert not (desk / "never").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rules": ["prodcut"]}, "config.yaml: rules: no fusion rule 'prodcut'"),
        ({"rules": [{"rule": "product", "gat": 0.4}]}, "config.yaml: rules: rule product has no option 'gat'"),
        ({"weights": ["nothing=1"]}, "config.yaml: weights name the objective 'nothing'"),
        ({"seed_per_prompt": 1}, "config.yaml: unknown setting 'seed_per_prompt'; did you mean 'seeds_per_prompt'?"),
    ],
)
def test_the_command_names_the_file_and_what_is_wrong_in_it(desk, monkeypatch, changes, told):
    """Before the base model is loaded."""
    monkeypatch.setattr("stepfuse.scripts.evaluation.run.evaluate", None)
    (desk / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "set", "--config", "config.yaml", "--output_dir", "never"])
    assert str(stop.value).startswith(f"error: {told}")
