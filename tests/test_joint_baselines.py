"""The baselines of joint training, and the sweep over what sets product and soup apart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stepfuse.fuse.lora.merge import merge_factors
from stepfuse.fuse.sets.adapter import read_factors
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import find_adapters
from stepfuse.scripts.baselines.conditioned_lora import train_conditioned
from stepfuse.scripts.baselines.product_or_soup import effects, resolved, sentence, sweep
from stepfuse.scripts.baselines.repeated_merging import repeated_merging
from stepfuse.train.settings import DDPOSettings
from tests.fixtures_tiny import refused
from tests.fixtures_training import COMMON, forget_accelerator

OBJECTIVES = [{"reward": "compressibility", "objective_name": "small"}, {"reward": "colourfulness", "rank": 2}]


@pytest.fixture
def settings(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red apple\na cat\ntwo keys\n")
    forget_accelerator()
    yield DDPOSettings(
        **COMMON
        | {"pretrained_model_name_or_path": str(tiny_base), "guidance": "off", "num_validation_images": 2}
        | {"num_generations": 2, "max_train_steps": 4, "objectives": OBJECTIVES}
    )
    forget_accelerator()


def test_a_conditioned_lora_is_written_as_adapters_of_one_a_and_of_one_b_with_other_scales(settings):
    adapters = find_adapters(train_conditioned(settings))
    factors = [read_factors(adapter)[1] for adapter in adapters]
    assert {layer.rank for layers in factors for layer in layers.values()} == {4 + 2}
    scales = set()
    for first, second in zip(factors[0].values(), factors[1].values(), strict=True):
        torch.testing.assert_close(first.down, second.down, rtol=0, atol=0)
        up, other = first.up.flatten(1), second.up.flatten(1)
        ratio = (up * other).sum(0) / (up * up).sum(0)  # of every column, by least squares
        torch.testing.assert_close(other, up * ratio, rtol=1e-4, atol=1e-7)
        scales |= {round(value, 3) for value in ratio.tolist()}
    assert len(scales) > 1  # the scales were trained
    with refused("learned"):
        train_conditioned(replace(settings, variance="learned", output_dir="other"))


def test_a_round_of_repeated_merging_starts_from_the_average_of_the_round_before(settings):
    folder = repeated_merging(replace(settings, output_dir="merged"), rounds=2)
    assert load_set(folder).names == ["small", "colourfulness"]
    assert load_set(folder).training.how == "apart"
    one = [read_factors(adapter)[1] for adapter in load_set("merged/round-1/set").adapters]
    expected, _ = merge_factors([("a", 0.5, one[0]), ("b", 0.5, one[1])])  # of rank 4 + 2: nothing is cut off
    for adapter in load_set("merged/round-1/start").adapters:
        for module, layer in read_factors(adapter)[1].items():
            exact = expected[module].up.flatten(1) @ expected[module].down.flatten(1)
            torch.testing.assert_close(layer.up.flatten(1) @ layer.down.flatten(1), exact, rtol=1e-4, atol=1e-6)
    records = [adapter.record for adapter in load_set(folder).adapters]
    assert [record["steps"] for record in records] == [1, 1]  # 4 steps, in 2 rounds of 2 objectives
    assert all(record["config"]["init_set"] == "merged/round-1/start" for record in records)
    with refused("max_train_steps"):
        repeated_merging(settings, rounds=3)


def test_the_effects_of_a_sweep_are_means_over_the_cells_of_each_level():
    # size 2 adds 1 to every image, 4 steps add 0.5, and prompt k has k more than prompt 0
    cells = [
        {
            "factors": {"size": size, "steps": steps},
            "difference": [k + (size == 2) + 0.5 * (steps == 4) for k in range(3)],
        }
        for size in (1, 2)
        for steps in (2, 4)
    ]
    found = {(one["factor"], one["level"]): one["difference"]["mean"] for one in effects(cells, ["a", "b", "c"])}
    assert found == pytest.approx(
        {("all", ""): 1.75, ("size", "1"): 1.25, ("size", "2"): 2.25, ("steps", "2"): 1.5, ("steps", "4"): 2.0}
    )
    intervals = [one["difference"] for one in effects(cells, ["a", "b", "c"])]
    assert len({round(i["high"] - i["low"], 9) for i in intervals}) == 1  # the same resamples of prompts


def test_a_cell_counts_where_its_interval_lies_on_one_side_of_0():
    cells = [{"difference": values} for values in ([1, 2, 3], [-1, -2, -3], [2, 2, 3], [-1, 0, 1])]
    assert resolved(cells, ["a", "b", "c"]) == (2, 1)
    assert sentence(2, 1, 4) == (
        "Of 4 cells product is better in 2 and soup in 1, by 95 % intervals. "
        "If the two were equal, each would be better in 0.1 cells by chance."
    )


def test_a_sweep_goes_on_where_it_stopped_and_refuses_another_set(settings, monkeypatch, tmp_path):
    monkeypatch.setattr("stepfuse.scripts.baselines.product_or_soup.STEPS", (2,))
    monkeypatch.setattr("stepfuse.scripts.baselines.product_or_soup.SIZES", (2.0,))
    folder = repeated_merging(replace(settings, output_dir="merged"), rounds=1)
    with torch.no_grad():
        text = sweep(load_set(folder), tmp_path / "sweep.json", ["a cat", "two keys"])
        before = yaml.safe_load((tmp_path / "sweep.json").read_text())
        assert len(before["cells"]) == 3  # schedules
        assert np.isfinite([cell["difference"] for cell in before["cells"]]).all()
        assert "distinct" in text
        monkeypatch.setattr(
            "stepfuse.scripts.baselines.product_or_soup.weighted_scores", None
        )  # nothing is drawn again
        assert sweep(load_set(folder), tmp_path / "sweep.json", ["a cat", "two keys"]) == text
        with refused("another set"):
            sweep(load_set(folder), tmp_path / "sweep.json", ["a cat"])
