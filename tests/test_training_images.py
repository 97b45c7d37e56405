"""How many images the adapters of a set drew in training, from its records."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from stepfuse.fuse.rules.registry import RULES, get_rule
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.evaluation.figures import summarise
from stepfuse.scripts.evaluation.tables import rules_table
from stepfuse.scripts.evaluation.training_images import _run, images_drawn, images_of_run
from tests.fixtures_evaluation import SETUP, cell

DDPO = {"train_batch_size": 48, "gradient_accumulation_steps": 2, "max_train_steps": 20, "num_inner_epochs": 1}
DPO = {"train_batch_size": 8, "gradient_accumulation_steps": 1, "max_train_steps": 60, "num_candidates": 4}


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"config": DDPO, "steps": 20}, 48 * 2 * 20),
        ({"config": DDPO | {"num_inner_epochs": 3}}, 48 * 2 * 7),  # of 20 steps 3, 3, 3, 3, 3, 3 and 2 on a rollout
        ({"config": DDPO, "steps": 14, "best": {"step": 14}}, 48 * 2 * 20),  # the best checkpoint of a whole run
        (
            {"config": DDPO, "steps": 7, "health": [{"what": "stopped", "step": 9, "kl": 3.0, "max_kl": 2.0}]},
            48 * 2 * 9,
        ),
        ({"config": DDPO, "processes": 4}, 48 * 2 * 20 * 4),
        ({"config": DPO}, 8 * 60 * 4),
        ({"config": DPO | {"pairs": "pickapic"}}, 0),
        ({}, None),
        ({"config": {"train_batch_size": 48}}, None),
        ({"config": DDPO | {"max_train_steps": "many"}}, None),
        ({"config": DDPO | {"num_inner_epochs": 0}}, None),
    ],
)
def test_the_images_of_a_run_follow_from_its_record(record, images):
    assert images_of_run(record) == images


def with_records(adapter_set, records):
    """The set with these records, of its adapters and then of its oracles."""
    left = iter(records)
    return adapter_set.map_adapters(lambda adapter: replace(adapter, record=next(left)))


@pytest.fixture(scope="module")
def emoji():
    return load_set("emoji", read_weights=False)


def test_a_rule_is_of_the_adapters_and_rule_oracle_of_the_oracles(emoji):
    """The three adapters are of one run of 240 steps, and each of the four oracles is of one of 54."""
    assert images_drawn(emoji, get_rule("product")) == 16 * 4 * 240
    assert images_drawn(emoji, get_rule("oracle")) == 4 * 16 * 4 * 54
    assert images_drawn(emoji, get_rule("base")) == 0


def test_a_run_of_several_adapters_is_counted_once(emoji):
    joint = {"objectives": ["compressibility", "colourfulness"], "rule": "soup"}
    run = {"config": DDPO, "config_sha256": "1" * 64, "joint": joint}
    alone = {"config": DPO, "config_sha256": "1" * 64}
    oracles = [{}] * len(emoji.oracles)
    together = with_records(emoji, [*oracles, run, run, alone])
    assert images_drawn(together, get_rule("soup")) == 48 * 2 * 20 + 8 * 60 * 4
    again = with_records(emoji, [*oracles, run, run | {"config_sha256": "2" * 64}, alone])
    assert images_drawn(again, get_rule("soup")) == 2 * 48 * 2 * 20 + 8 * 60 * 4


def test_with_an_adapter_of_an_unknown_run_the_number_is_unknown(emoji):
    records = [{}] * len(emoji.oracles) + [{"config": DDPO}, {"config": DDPO}, {}]
    assert images_drawn(with_records(emoji, records), get_rule("soup")) is None


def test_the_images_of_a_rule_are_in_the_summary_and_the_table_of_rules(emoji):
    drawn = {"product": 1920, "oracle": None}
    cells = [cell("base", None), cell("product", 0.5, (1, 1)), cell("oracle", 0.5, (2, 2)), cell("mine", 0.5)]
    summary = summarise(pd.concat(cells), replace(SETUP, training_images=drawn), draws=20)
    assert {rule: of_rule["training_images"] for rule, of_rule in summary["rules"].items()} == {
        "base": None,
        "product": 1920,
        "oracle": None,
        "mine": None,
    }
    shown = rules_table(summary)
    column = [figure.heading for figure in shown["columns"]].index("training images")
    assert [row[column]["main"] for row in shown["rows"]] == ["—", "1920", "—", "—"]
    json.dumps(summary, allow_nan=False)
    assert set(summary["rules"]) - {"mine"} <= set(RULES)


def test_adapters_that_were_distilled_together_are_of_one_run_and_a_run_from_other_adapters_is_not_known():
    config = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "max_train_steps": 10}
    distilled = {"config": config, "config_sha256": "a", "distilled": {"rule": "product"}}
    assert _run(distilled) == _run(dict(distilled)) != ()
    assert _run({"config": config, "config_sha256": "a"}) == ()
    assert images_of_run(distilled) == 40
    assert images_of_run({"config": config | {"init_set": "emoji"}}) is None
