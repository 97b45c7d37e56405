"""Several sets of one base in one evaluation: whose adapters a rule fuses, what is common to all, what is refused."""

import json
import shutil

import pandas as pd
import pytest

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.edit import shorten
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.scripts.evaluation.config import EvaluationConfig, cells_of
from stepfuse.scripts.evaluation.run import evaluate
from stepfuse.train.rollout import sample_generator
from tests.fixtures_evaluated import CONFIG, save_desk, table, without_costs
from tests.fixtures_tiny import refused, save_adapter, save_stable_diffusion

MIDDLE = "a=0.5,b=0.5"
OWN = ["product", {"rule": "oracle", "weights": [MIDDLE]}]
JOINT = [{"rule": rule, "set": "joint", "label": label} for rule, label in (("soup", "joint"), ("product", "again"))]
SEVERAL = CONFIG | dict(rules=[JOINT[0], *OWN, JOINT[1]], steps=2)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A further set of the same objectives, of other ranks, steps and order than the first."""
    desk = save_desk(tmp_path_factory.mktemp("desk"))
    for seed, (name, reward) in enumerate({"b": "compressibility", "a": "colourfulness"}.items()):
        own = dict(seed=7 + seed, rank=3, num_inference_steps=5, guidance="off", variance=EtaSchedule(eta=0.9))
        save_adapter(desk / "trained" / name, desk / "base", name, reward=reward, **own)
    create_set(desk / "joint", [desk / "trained" / "b", desk / "trained" / "a"])
    return desk


@pytest.fixture(autouse=True)
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


@pytest.fixture(scope="module")
def several(desk):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        evaluate("set", EvaluationConfig(**SEVERAL), desk / "out")
    return desk / "out"


def cell_of(frame, rule, weights):
    return frame[(frame.rule == rule) & (frame.weights == weights)].reset_index(drop=True)


def test_a_rule_of_another_set_has_the_images_that_this_set_draws(several):
    frame = table(several)
    sampler = FusedSampler.from_pretrained("joint")
    for label, rule in (("joint", "soup"), ("again", "product")):
        row = cell_of(frame, label, MIDDLE).iloc[3]
        (image,) = sampler.with_rule(rule).sample(
            [row.prompt],
            {"a": 0.5, "b": 0.5},
            num_inference_steps=2,
            generator=[sample_generator(0, "evaluate", row.prompt, int(row.seed))],
            output_type="pt",
            progress=False,
        )
        assert row.reward_colourfulness == pytest.approx(colourfulness(image[None], [row.prompt]).item(), abs=1e-3)


def test_the_set_that_is_evaluated_has_the_images_that_it_has_without_others(several, tmp_path):
    evaluate("set", EvaluationConfig(**SEVERAL | dict(rules=OWN)), tmp_path / "out")
    own = table(several)[lambda frame: frame.rule.isin(["base", "product", "oracle"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(without_costs(own), without_costs(table(tmp_path / "out")))


def test_one_adapter_alone_is_drawn_once_in_each_set(several):
    """base, a and b and the middle of product, the oracle; of the other set a and b once and the middle twice."""
    assert len(list((several / "parts").iterdir())) == 2 * (5 + 4)
    frame = table(several)
    columns = ["w_a", "w_b", "reward_colourfulness", "kl"]
    ours, joint, again = (cell_of(frame, rule, "a=1")[columns] for rule in ("product", "joint", "again"))
    pd.testing.assert_frame_equal(joint, again)
    assert (ours.w_a == joint.w_a).all()
    assert not ours.reward_colourfulness.equals(joint.reward_colourfulness)


def test_all_sets_have_the_base_and_the_oracles_of_the_one_that_is_evaluated(several):
    """In units of the scales 5 and 0.2: gain over the base, and what the oracle has more."""
    summary, frame = json.loads((several / "summary.json").read_text()), table(several)
    scaled = 0.5 * frame.reward_colourfulness / 5 + 0.5 * frame.reward_compressibility / 0.2
    means = scaled.groupby([frame.rule, frame.weights]).mean()
    (joint,) = (cell for cell in summary["cells"] if (cell["rule"], cell["weights"]) == ("joint", MIDDLE))
    assert joint["scalarised_gain"]["mean"] == pytest.approx(means["joint", MIDDLE] - means["base", ""])
    assert joint["regret"]["mean"] == pytest.approx(means["oracle", MIDDLE] - means["joint", MIDDLE])
    assert joint["oracle"] == "oracle"
    assert summary["sets"] == {"joint": "joint", "again": "joint"}
    assert "fuses the adapters of the set joint" in (several / "report.html").read_text()


def test_the_manifest_of_the_set_keeps_the_gains_of_its_own_rules(several):
    summary = json.loads((several / "summary.json").read_text())
    assert {cell["rule"] for cell in summary["cells"]} == {"base", "product", "oracle", "joint", "again"}
    assert {cell["rule"] for cell in shorten(summary)["cells"]} == {"product", "oracle"}


def test_an_evaluation_is_resumed_with_the_same_sets_only(several, desk, tmp_path):
    before, output = table(several), tmp_path / "out"
    shutil.copytree(several, output)
    for part in sorted((output / "parts").iterdir())[::3]:
        part.unlink()
    evaluate("set", EvaluationConfig(**SEVERAL), output)
    pd.testing.assert_frame_equal(without_costs(table(output)), without_costs(before))
    create_set(tmp_path / "other", [desk / "a", desk / "trained" / "b"])
    kept = (desk / "joint").rename(desk / "kept")
    (tmp_path / "other").rename(desk / "joint")
    try:
        with refused("another evaluation"):
            evaluate("set", EvaluationConfig(**SEVERAL), output)
    finally:
        shutil.rmtree(desk / "joint")
        kept.rename(desk / "joint")


@pytest.mark.parametrize(
    ("entry", "culprits"),
    [
        ({"rule": "soup", "set": "joint"}, ["soup", "'joint'", "label"]),
        ({"rule": "soup", "set": "joint", "label": "product"}, ["'joint'", "'product'", "label"]),
        ({"rule": "soup", "set": 3, "label": "x"}, ["x", "3", "folder"]),
        ({"rule": "soup", "set": "nowhere", "label": "x"}, ["nowhere"]),
        ({"rule": "soup", "set": "single", "label": "x"}, ["'single'", "objectives a,", "a, b"]),
        ({"rule": "soup", "set": "stranger", "label": "x"}, ["'stranger'", "another base"]),
        ({"rule": "soup", "set": "sized", "label": "x"}, ["'sized'", "resolution 32"]),
        ({"rule": "soup", "set": "reference", "label": "x"}, ["'reference'", "0.5", "base_schedule"]),
        ({"rule": "oracle", "set": "joint", "label": "x"}, ["x a=0.5,b=0.5", "no oracle"]),
    ],
)
def test_a_set_that_cannot_be_compared_is_named_and_nothing_is_written(desk, tmp_path, entry, culprits):
    others = {
        "single": lambda: create_set("single", [desk / "a"]),
        "reference": lambda: create_set("reference", [desk / "a", desk / "b"], base_schedule=EtaSchedule(eta=0.5)),
        "stranger": lambda: stranger(desk),
        "sized": lambda: sized(desk),
    }
    if entry["set"] in others:
        others[entry["set"]]()
    with refused(*culprits):
        evaluate("set", EvaluationConfig(**CONFIG | dict(rules=["product", entry])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stranger(desk):
    """A set of another base, whose network is larger."""
    base = save_stable_diffusion(desk / "larger", channels=(32, 64))
    for name in ("a", "b"):
        save_adapter(desk / "strange" / name, base, name, reward="colourfulness", guidance="off")
    create_set("stranger", [desk / "strange" / name for name in ("a", "b")])


def sized(desk):
    """A set of adapters that were trained at another resolution."""
    shutil.copytree(desk / "plain", desk / "sized")
    file = desk / "sized" / "adapter_set.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"base": values["base"] | {"resolution": 32}}))


def test_a_label_is_of_one_set():
    entries = [
        {"rule": "soup", "set": folder, "label": "x", "weights": [weights]}
        for folder, weights in (("one", "a=1"), ("two", "b=1"))
    ]
    with refused("two sets", "'x'"):
        cells_of(EvaluationConfig(rules=entries), ["a", "b"])
