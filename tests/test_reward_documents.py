"""What docs/rewards and docs/how-to/reward.md say of rewards is what was measured, and what the catalogue has."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepfuse.data.file_info import size_label
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.benchmark.rewards import OURS, parity_table, reward_table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "rewards"
ACCOUNT = (FOLDER / "README.md").read_text()
HOW_TO = (ROOT / "docs" / "how-to" / "reward.md").read_text()


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


@pytest.mark.parametrize(("name", "table"), [("parity.json", parity_table), ("bench.json", reward_table)])
def test_the_tables_are_those_of_the_measurements(name: str, table: Callable[[dict], str]) -> None:
    results = read(name)
    assert table(results) in ACCOUNT
    assert results["machine"] in ACCOUNT
    assert [row["reward"] for row in results["rows"]] == list(OURS)
    assert results["settings"]["size"] == "published"


def test_scores_were_the_originals_to_a_ten_thousandth_on_64_pictures() -> None:
    for row in read("parity.json")["rows"]:
        assert row["images"] == 64
        assert row["float32"]["largest_difference"] < 1e-4
        assert row["scores"]["deviation"] > 100 * row["float32"]["largest_difference"]
    assert "to 1e-4" in re.sub(r"\s+", " ", HOW_TO)


def test_the_worked_example_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", HOW_TO, flags=re.DOTALL)
    name = re.search(r"--reward (\S+)", code)[1]
    (tmp_path / name.split(":")[0]).write_text(code)
    assert code.count("\n") <= 10
    colours = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])[:, :, None, None].expand(2, 3, 4, 4)
    # ITU-R BT.601: white is 100, green 58.7
    assert load_reward(name)(colours, ["", ""]).tolist() == pytest.approx([100, 58.7])


def test_every_reward_is_in_the_table_with_its_download_and_gradient() -> None:
    lines = [line for line in ACCOUNT.splitlines() if line.startswith("| `")]
    for name, info in REWARDS.items():
        (line,) = [line for line in lines if f"`{name}`" in line or f"`{name}:" in line.split("|")[1]]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2].startswith("yes" if info.differentiable else "no") or name == "weighted"
        assert (f"downloads {size_label(sum(file.size for file in info.files))}" in cells[3]) == bool(info.files)
        assert cells[4].split(",")[0].split(" ")[0] in (*info.licence.split(" "), "weights:", "the", "")
