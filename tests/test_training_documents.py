"""The statements of docs/training and docs/how-to/small-gpu.md about speed and memory agree with the measurements."""

import json
from pathlib import Path

import pytest

from stepfuse.scripts.benchmark.training import training_table

FOLDER = Path(__file__).parents[1] / "docs" / "training"
REPORT = (FOLDER / "README.md").read_text()
SMALL_GPU = (FOLDER.parent / "how-to" / "small-gpu.md").read_text()
GOAL = 1.5


def rows(name: str) -> dict[tuple[str, str], dict]:
    return {(row["algorithm"], row["name"]): row for row in json.loads((FOLDER / name).read_text())["rows"]}


@pytest.mark.parametrize("name", ["emoji.json", "sd15.json", "sd15-ddpo.json"])
def test_the_tables_are_those_of_the_measurements(name: str) -> None:
    assert training_table(json.loads((FOLDER / name).read_text())) in REPORT


def test_dpo_reaches_the_goal_on_both_models_and_on_the_larger_one_with_two_steps_a_forward() -> None:
    for measured in (rows("emoji.json"), rows("sd15.json")):
        assert measured["dpo", "stepfuse, 2 steps a forward"]["ratio"] >= GOAL
    assert rows("emoji.json")["dpo", "stepfuse"]["ratio"] >= GOAL > rows("sd15.json")["dpo", "stepfuse"]["ratio"]


def test_ddpo_without_a_kl_reaches_the_goal_on_the_embedded_base_alone_and_with_one_step_or_a_kl_nowhere() -> None:
    emoji, larger = rows("emoji.json"), [rows("sd15.json"), rows("sd15-ddpo.json")]
    best, other = emoji["ddpo", "stepfuse, no KL, 2 steps a forward"], emoji["ddpo", "ddpo-pytorch"]
    assert best["ratio"] >= GOAL
    assert best["peak_memory_mb"] <= 1.02 * other["peak_memory_mb"]
    for measured in larger:
        assert 0.95 * GOAL < measured["ddpo", "stepfuse, no KL, 2 steps a forward"]["ratio"] < GOAL
    for measured in (emoji, *larger):
        for name in ("stepfuse, 2 steps a forward", "stepfuse, no KL", "stepfuse"):
            assert measured["ddpo", name]["ratio"] < GOAL


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("ddpo", "stepfuse, no KL, 2 steps a forward"),
        ("ddpo", "ddpo-pytorch"),
        ("dpo", "stepfuse, 2 steps a forward"),
        ("dpo", "SPO"),
    ],
)
def test_the_report_states_the_measured_memory(algorithm: str, name: str) -> None:
    shown = f"{rows('sd15-memory.json')[algorithm, name]['peak_memory_mb']:,.0f} MB"
    assert shown in REPORT
    assert algorithm != "dpo" or shown in SMALL_GPU
