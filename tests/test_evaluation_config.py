"""The configuration of an evaluation: the cells it makes, and what is refused of it."""

from pathlib import Path

import pytest

from stepfuse.data.settings_file import load_settings
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.scripts.evaluation.config import EvaluationConfig, cells_of, simplex
from tests.fixtures_tiny import refused

NAMES = ["a", "b"]


def test_the_simplex_holds_every_multiple_of_its_grid():
    """Three objectives in halves: three alone, three pairs; in thirds 3 + 6 + 1."""
    halves = simplex(["x", "y", "z"], 2)
    assert halves[:3] == [{"x": 1}, {"y": 1}, {"z": 1}]
    assert halves[3:] == [{"x": 0.5, "y": 0.5}, {"x": 0.5, "z": 0.5}, {"y": 0.5, "z": 0.5}]
    assert len(simplex(["x", "y", "z"], 3)) == 10
    assert len(simplex(NAMES, 4)) == 5


def test_a_rule_may_name_its_own_weights_label_and_strengths():
    config = EvaluationConfig(
        rules=[{"rule": "product", "label": "strong", "strengths": [1, 2], "weights": ["a=0.9@0-0.5,0.2@0.5-1,b=0.5"]}]
    )
    assert [str(cell) for cell in cells_of(config, NAMES)] == [
        "base",
        "strong a=0.9@0-0.5,0.2@0.5-1,b=0.5",
        "strong a=0.9@0-0.5,0.2@0.5-1,b=0.5 strength 2",
    ]


def test_weights_between_those_of_the_grid_are_cells_of_every_rule_that_lists_none():
    """Rule oracle lists those that it was trained at."""
    quarters = ["a=0.25,b=0.75", {"a": 0.75, "b": 0.25}]
    rules = ["soup", {"rule": "kl", "strength": 0.5}, {"rule": "oracle", "weights": ["a=0.5,b=0.5"]}]
    measured = {}
    for cell in cells_of(EvaluationConfig(weights=quarters, rules=rules), NAMES):
        measured.setdefault(cell.label, []).append(cell.weights_label)
    assert measured["soup"] == ["a=1", "b=1", "a=0.5,b=0.5", "a=0.25,b=0.75", "a=0.75,b=0.25"]
    assert measured["kl"] == ["a=1", "b=1"]  # of single objectives
    assert measured["oracle"] == ["a=0.5,b=0.5"]


def test_a_rule_of_another_set_has_all_weights_and_a_label_of_its_own():
    entry = {"rule": "soup", "set": "outputs/joint", "label": "joint"}
    _, *cells = cells_of(EvaluationConfig(rules=[entry]), NAMES)
    assert [str(cell) for cell in cells] == ["joint a=1", "joint b=1", "joint a=0.5,b=0.5"]
    assert {cell.set for cell in cells} == {"outputs/joint"}


@pytest.mark.parametrize("config", sorted((Path(__file__).parents[1] / "configs" / "eval").glob("*.yaml")), ids=str)
def test_every_config_that_is_shipped_makes_cells(config):
    emoji = ["compressibility", "colourfulness", "alignment"]
    names = {
        "emoji": emoji,
        "emoji-flow": ["lightness", "subject_size"],
        "emoji-joint": emoji,
        "emoji-thirds": emoji,
        "sd15": ["alignment", "compressibility"],
        "sd35": ["pickscore", "ocr"],
    }
    cells = cells_of(load_settings(config, EvaluationConfig), names.get(config.stem, ["a", "b", "c", "d", "e"]))
    assert {"base", "product", "soup"} <= {cell.label for cell in cells}


@pytest.mark.parametrize("name", ["sd15", "sd35"])
def test_configs_of_published_models_have_a_judge_of_the_catalogue(name):
    config = load_settings(Path(__file__).parents[1] / "configs" / "eval" / f"{name}.yaml", EvaluationConfig)
    assert config.judges
    assert set(config.judges) <= REWARDS.keys()


def test_a_config_may_switch_guidance_off(tmp_path):
    (tmp_path / "config.yaml").write_text("guidance: off\n")
    assert load_settings(tmp_path / "config.yaml", EvaluationConfig).guidance == "off"


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("seeds_per_promt: 3", ["'seeds_per_promt'", "'seeds_per_prompt'"]),
        ("seeds_per_prompt: many", ["seeds_per_prompt", "many"]),
        ("seeds_per_prompt: 0", ["seeds_per_prompt", "0"]),
        ("batch_size: 0", ["batch_size is 0", "1 or more"]),
        ("grid: 0", ["grid is 0", "1 or more"]),
        ("steps: 0", ["steps is 0", "1 or more"]),
        ("kl_seeds: -1", ["kl_seeds is -1", "0 or more"]),
        ("strip_prompts: -1", ["strip_prompts is -1", "0 or more"]),
        ("seed: -1", ["seed is -1", "2^64 - 1"]),
        ("guidance_scale: .nan", ["guidance_scale is nan", "a finite number"]),
        ("scales: {a: .inf}", ["the scale of a is inf", "a positive number"]),
        ("rules: []", ["rules"]),
        ("[", ["YAML"]),
        ("", ["does not hold settings"]),
    ],
)
def test_a_config_that_makes_no_evaluation_is_named(tmp_path, text, culprits):
    (tmp_path / "config.yaml").write_text(text)
    with refused("config.yaml", *culprits):
        load_settings(tmp_path / "config.yaml", EvaluationConfig)
