"""Adapters that were trained together: their set, its default rule and card, and training that starts from a set."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import LearnedSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter, read_factors, write_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import card
from stepfuse.fuse.sets.create import create_set, find_adapters
from stepfuse.fuse.sets.manifest import MANIFEST
from stepfuse.fuse.sets.set_training import training_of
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.recipes.build_set import read_build
from stepfuse.scripts.recipes.training import Training
from stepfuse.train.init_set import resolve_objectives
from stepfuse.train.loop import train_adapter
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_tiny import refused
from tests.fixtures_training import COMMON, forget_accelerator

OBJECTIVES = [
    {"reward": "compressibility", "objective_name": "small"},
    {"reward": "colourfulness", "objective_name": "colour", "variance": "learned", "variance_knots": 3, "rank": 2},
]
SAMPLED = {"sample_num_steps": 3, "guidance": "off", "num_validation_images": 2, "sample_eta": 0.9}
WEIGHTED = {"small": 0.25, "colour": 0.75}


@pytest.fixture(scope="module")
def joint(tmp_path_factory, tiny_base):
    """Two objectives, trained together for two steps."""
    folder = tmp_path_factory.mktemp("joint")
    (folder / "prompts.txt").write_text("a red apple\na cat\ntwo keys\n")
    values = COMMON | SAMPLED | {"prompts": str(folder / "prompts.txt"), "output_dir": str(folder / "run")}
    values |= {"pretrained_model_name_or_path": str(tiny_base), "num_generations": 2, "max_train_steps": 2}
    settings = DDPOSettings(**values | {"objectives": OBJECTIVES, "vertex_share": 0.5, "reward": "clip_score"})
    forget_accelerator()
    train_adapter(settings)
    forget_accelerator()
    return settings


@pytest.fixture(scope="module")
def joint_set(joint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "set"
    create_set(folder, [joint.output_dir])
    return folder


@pytest.fixture
def apart(joint, tmp_path):
    """One of the adapters, as if it had been trained alone."""
    adapter = read_adapter(Path(joint.output_dir) / "small")
    record = {k: v for k, v in adapter.record.items() if k != "joint"} | {"config_sha256": 64 * "0"}
    objective = replace(adapter.objective, name="alone")
    return copy_of(replace(adapter, objective=objective, record=record), tmp_path / "alone")


def copy_of(adapter, folder):
    part, factors = read_factors(adapter)
    write_adapter(replace(adapter, folder=folder), factors, part)
    return folder


def test_the_folder_of_a_joint_run_stands_for_all_of_its_adapters_in_their_order(joint, joint_set):
    assert [adapter.name for adapter in find_adapters(joint.output_dir)] == ["small", "colour"]
    loaded = load_set(joint_set)
    assert loaded.names == ["small", "colour"]
    assert [adapter.rank for adapter in loaded.adapters] == [4, 2]


def test_a_set_of_a_joint_run_is_fused_by_the_rule_that_it_was_trained_for(joint_set, capsys):
    loaded = load_set(joint_set)
    assert loaded.default_rule == "soup"
    values = json.loads((joint_set / MANIFEST).read_text())
    assert values["training"] == {"how": "jointly", "rule": "soup"}
    assert "jointly" in str(loaded.training)
    assert "trained together" in card(loaded, source="owner/name", shown=[])
    main(["set", "show", str(joint_set)])
    assert "jointly" in capsys.readouterr().out


def test_adapters_of_several_runs_are_a_set_of_adapters_trained_apart(joint, apart, tmp_path):
    folder = Path(joint.output_dir)
    created = create_set(tmp_path / "mixed", [folder / "small", apart])
    assert created.training.how == "apart"
    assert created.default_rule == "product"
    assert "training" not in json.loads((tmp_path / "mixed" / MANIFEST).read_text())
    assert training_of([read_adapter(folder / "small")]).how == "apart"  # one adapter alone


def test_a_default_rule_can_be_chosen(joint, tmp_path, capsys):
    main(["set", "create", str(tmp_path / "set"), "--adapter", joint.output_dir, "--rule", "product"])
    assert load_set(tmp_path / "set").default_rule == "product"
    with refused("'prodct'", "product"):
        create_set(tmp_path / "other", [joint.output_dir], rule="prodct")


def test_a_folder_that_lacks_an_adapter_of_its_run_is_refused(joint, tmp_path):
    copy_of(read_adapter(Path(joint.output_dir) / "small"), tmp_path / "run" / "small")
    with refused("small, colour", "train again"):
        find_adapters(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # two LoRAs, as is meant
def test_lora_strengths_in_diffusers_are_the_weights_of_the_trained_policy(joint_set, tiny_base):
    """What ComfyUI and diffusers do with several LoRAs: their strengths times B A, added up."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    for name in WEIGHTED:
        pipe.load_lora_weights(joint_set, subfolder=name, weight_name=WEIGHTS, adapter_name=name)
    pipe.set_adapters(list(WEIGHTED), list(WEIGHTED.values()))
    sampler = FusedSampler.from_pretrained(joint_set)
    plan, conditioning = sampler.plan(WEIGHTED, 1), sampler.backbone.encode(["a cat"])
    x = torch.randn(1, *sampler.backbone.shape(), generator=torch.Generator().manual_seed(0))
    t = plan.steps[0][0]
    with torch.no_grad():
        theirs = pipe.unet(x, t, conditioning.inputs("+")["prompt_embeds"]).sample
        variance = sum(
            w * o.variance.relative(plan.path, *plan.steps[0], x)
            for w, o in zip(WEIGHTED.values(), sampler.objectives, strict=True)
        )
        fused = sampler.step(x, 0, plan, conditioning)
    v = variance * plan.path.ancestral_variance(*plan.steps[0], x)
    expected = transition(plan.path, x, theirs, *plan.steps[0], v)
    torch.testing.assert_close(fused.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.variance, expected.variance)


# Training that starts from a set


def refine(joint, init, **changes):
    forget_accelerator()
    settings = replace(joint, **{"objectives": [], "init_set": str(init), "max_train_steps": 1} | changes)
    train_adapter(settings)
    forget_accelerator()
    return Path(settings.output_dir)


def test_training_starts_from_the_adapters_of_a_set_and_takes_its_objectives(joint, joint_set, tmp_path):
    # With next to no learning rate the adapters are those of the set, and so are their schedules.
    output = refine(joint, joint_set, output_dir=str(tmp_path / "run"), learning_rate=1e-12, variance_learning_rate=0.0)
    before, after = load_set(joint_set), find_adapters(output)
    assert [adapter.name for adapter in after] == before.names
    for own, new in zip(before.adapters, after, strict=True):
        assert new.objective.reward == own.objective.reward
        assert new.objective.beta == own.objective.beta
        for old, one in zip(tensors(own), tensors(new), strict=True):
            torch.testing.assert_close(one, old, rtol=0, atol=1e-6)
        assert new.record["inputs"][f"{joint_set}/{own.name}"] == own.sha256
        assert new.record["joint"]["objectives"] == before.names
    offsets = [
        adapter.objective.variance for adapter in after if isinstance(adapter.objective.variance, LearnedSchedule)
    ]
    (trained,) = offsets
    torch.testing.assert_close(trained.offsets, before.adapters[1].objective.variance.offsets)


def tensors(adapter):
    _, factors = read_factors(adapter)
    return [
        value * (layer.scaling if kind == "up" else 1)
        for layer in factors.values()
        for kind, value in (("up", layer.up), ("down", layer.down))
    ]


def test_an_initial_set_in_half_precision_or_of_one_adapter_is_taken_too(joint, tmp_path):
    create_set(tmp_path / "one", [Path(joint.output_dir) / "small"], half=True)
    output = refine(
        joint, tmp_path / "one", output_dir=str(tmp_path / "run"), reward="compressibility", objective_name="small"
    )
    (adapter,) = find_adapters(output)
    assert adapter.folder == output
    assert "joint" not in adapter.record


def test_an_initial_set_without_an_objective_or_with_a_strangers_reward_is_refused(joint, joint_set, apart, tmp_path):
    with refused("'other'", "small, colour"):
        resolve_objectives(
            replace(joint, objectives=[*OBJECTIVES, {"objective_name": "other"}], init_set=str(joint_set))
        )
    adapter = read_adapter(apart)
    code = replace(adapter, objective=replace(adapter.objective, name="code", reward="evil.py:reward"))
    copy_of(code, tmp_path / "code")
    create_set(tmp_path / "set", [apart, tmp_path / "code"])
    with refused("evil.py", "objectives"):
        resolve_objectives(replace(joint, objectives=[], init_set=str(tmp_path / "set")))
    with refused("nowhere"):
        resolve_objectives(replace(joint, init_set="nowhere"))


def test_guidance_or_a_schedule_that_the_adapters_were_not_trained_with_is_refused(joint, joint_set):
    with refused("guidance is shared", "expected off"):
        resolve_objectives(replace(joint, init_set=str(joint_set), guidance="shared"))
    entries = [{**entry, "beta": 0.0, "variance": "eta"} for entry in OBJECTIVES]
    with refused("beta is 0"):  # the set's schedule of one is trained, whatever the settings say
        resolve_objectives(replace(joint, objectives=entries, init_set=str(joint_set)))


def test_beta_of_the_set_counts_for_the_algorithm_that_it_was_trained_by(joint, joint_set):
    again, _ = resolve_objectives(replace(joint, objectives=[], init_set=str(joint_set), beta=0.7))
    assert [each.beta for each in again.each] == [0.1, 0.1]
    dpo = DPOSettings(init_set=str(joint_set), guidance="off", beta=0.7)
    other, _ = resolve_objectives(dpo)
    assert [each.beta for each in other.each] == [0.7, 0.7]


def test_the_record_has_the_rank_of_the_set_and_a_build_finds_the_run_again(joint, joint_set, tmp_path):
    values = {"init_set": str(joint_set), "rank": 16, "max_train_steps": 2, "vertex_share": 0.0}
    settings = replace(joint, objectives=[], output_dir=str(tmp_path / "run"), **values)
    forget_accelerator()
    train_adapter(settings)
    forget_accelerator()
    small, colour = find_adapters(tmp_path / "run")
    assert [adapter.record["config"]["rank"] for adapter in (small, colour)] == [4, 2]
    assert colour.record["config"]["variance"] == "learned"
    resolved, _ = resolve_objectives(settings)
    assert len(Training(settings=resolved, folder=tmp_path / "run").finished) == 2


def test_folders_of_several_runs_do_not_stand_for_one(joint, apart, tmp_path):
    copy_of(read_adapter(Path(joint.output_dir) / "small"), tmp_path / "runs" / "small")
    copy_of(read_adapter(apart), tmp_path / "runs" / "alone")
    with refused("several runs", "by itself"):
        find_adapters(tmp_path / "runs")


# Builds


def test_a_build_trains_together_the_objectives_of_one_training(joint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "joint.yaml").write_text(yaml.safe_dump({"objectives": OBJECTIVES, "num_generations": 2}))
    (tmp_path / "oracle.yaml").write_text(yaml.safe_dump({"reward": "colourfulness", "objective_name": "alone"}))
    build = {
        "objectives": [{"algorithm": "ddpo", "config": "joint.yaml"}, {"algorithm": "dpo", "config": "oracle.yaml"}]
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(build))
    _, trainings, _, _ = read_build(tmp_path / "build.yaml")
    assert [training.names for training in trainings] == [["small", "colour"], ["alone"]]
    assert trainings[0].finished == []
    build["objectives"].append({"algorithm": "dpo", "config": "oracle.yaml", "objective_name": "colour"})
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(build))
    with refused("colour"):
        read_build(tmp_path / "build.yaml")


def test_a_joint_training_is_found_again_when_it_has_finished(joint):
    done = Training(settings=joint, folder=Path(joint.output_dir))
    assert [adapter.name for adapter in done.finished] == ["small", "colour"]
    assert Training(settings=replace(joint, seed=1), folder=Path(joint.output_dir)).finished == []
    dpo = DPOSettings(objectives=OBJECTIVES)
    assert Training(settings=dpo, folder=Path(joint.output_dir)).finished == []
