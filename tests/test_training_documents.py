"""What docs/training says of speed is what its measurements hold."""

import json
from pathlib import Path

import pytest

from stepfuse.scripts.benchmark.training import training_table

FOLDER = Path(__file__).parents[1] / "docs" / "training"
ACCOUNT = (FOLDER / "README.md").read_text()


def ratios(name: str) -> dict[tuple[str, str], float]:
    return {(row["algorithm"], row["name"]): row["ratio"] for row in json.loads((FOLDER / name).read_text())["rows"]}


@pytest.mark.parametrize("name", ["emoji.json", "sd15.json"])
def test_the_tables_are_those_of_the_measurements(name: str) -> None:
    assert training_table(json.loads((FOLDER / name).read_text())) in ACCOUNT


def test_what_is_said_of_the_goal_is_what_was_measured() -> None:
    assert (
        "A step of DPO has it on the embedded base and not on the larger one; a step of DDPO has it on neither"
        in ACCOUNT
    )
    emoji, sd15 = ratios("emoji.json"), ratios("sd15.json")
    assert emoji["dpo", "stepfuse"] >= 1.5 > sd15["dpo", "stepfuse"]
    for measured in (emoji, sd15):
        assert max(measured["ddpo", "stepfuse"], measured["ddpo", "stepfuse, no KL"]) < 1.5
