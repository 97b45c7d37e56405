"""Distillation: the soup of students becomes the product of their teachers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.sampling.measure_gaps import measure_gaps
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter, read_factors, write_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.train import distill
from stepfuse.train.arguments import parse_settings
from stepfuse.train.distill_settings import DistillSettings, with_set
from stepfuse.train.distill_setup import DistillSetup
from stepfuse.train.distillation import Distillation, collect_steps
from stepfuse.train.gap_validation import gap_of_runs
from tests.fixtures_distill import SCHEDULES, save_opposed_set
from tests.fixtures_tiny import refused
from tests.fixtures_training import as_flags, forget_accelerator, refused_by

PROMPTS = ["a red apple", "a cat", "two keys", "a fox"]
WEIGHTS = "pytorch_lora_weights.safetensors"
COMMON = {"prompts": "prompts.txt", "report_to": "none", "num_validation_images": 4, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with prompts and a set to work in."""
    folder = tmp_path_factory.mktemp("desk")
    save_opposed_set(folder, scale=4.0)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(*words, **flags):
    """main() of train/distill.py; words in place of the set come first."""
    forget_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train/distill.py", *(words or ["set"]), *as_flags(COMMON | flags)])
        distill.main()


def setup_of(**settings):
    forget_accelerator()
    loaded = load_set("set")
    values = with_set(DistillSettings(**COMMON | {"adapter_set": "set"} | settings), loaded)
    return DistillSetup(values, Accelerator(cpu=True), PROMPTS, loaded)


@pytest.fixture(scope="module")
def distilled(desk):
    run(output_dir="out", max_train_steps=60, train_batch_size=8, lr_scheduler="cosine", timesteps_per_forward=3)
    return create_set(desk / "students", ["out"])


# What is left of the gap


def test_at_most_a_tenth_of_the_gap_is_left(distilled):
    record = distilled.adapters[0].record
    assert record["algorithm"] == "distill"
    of = record["distilled"]
    assert of["set"] == "set"
    assert of["rule"] == "product"
    assert of["gap_before"] > 100
    assert of["share_left"] == of["gap_after"] / of["gap_before"] <= 0.1
    (mixture,) = of["mixtures"]
    assert mixture == {"weights": {"a": 0.5, "b": 0.5}} | {k: of[k] for k in ("gap_before", "gap_after", "share_left")}
    assert max(of["vertices"].values()) < 0.1 * of["gap_before"]


def test_a_profile_of_the_students_agrees(distilled):
    before, after = (
        sum(measure_gaps(FusedSampler.from_pretrained(folder), PROMPTS, progress=False).gaps[0])
        for folder in ("set", "students")
    )
    assert after <= 0.1 * before


def test_students_have_the_objectives_of_their_teachers(distilled):
    teachers = load_set("set")
    for student, teacher in zip(distilled.adapters, teachers.adapters, strict=True):
        assert student.objective.reward == f"reward_of_{student.name}"
        assert str(student.objective) == str(teacher.objective)
        assert str(student.objective.variance) == str(SCHEDULES[student.name])
        assert (student.license, student.guidance, student.guidance_scale) == ("mit", "shared", 3.0)
        assert student.rank == teacher.rank
        assert student.sha256 != teacher.sha256
    assert distilled.reward_scales == teachers.reward_scales == {"a": 0.5, "b": 0.5}
    assert distilled.base == teachers.base


def test_one_network_samples_what_the_teachers_product_would(distilled):
    def draw(folder, rule, **options):
        sampler = FusedSampler.from_pretrained(folder, rule=rule)
        seeds = [numbered_generator(0, i) for i in range(len(PROMPTS))]
        return sampler.sample(PROMPTS, generator=seeds, output_type="latent", progress=False, **options)

    one_network = Product(gate=float("inf"))
    wanted = draw("set", "product")
    before, after = ((draw(folder, one_network) - wanted).norm() for folder in ("set", "students"))
    assert after < 0.5 * before


# The loss, and what is measured


def test_before_training_the_gap_is_that_of_the_profile_and_a_vertex_has_none(desk):
    setup = setup_of()
    expected = measure_gaps(FusedSampler.from_pretrained("set"), PROMPTS, progress=False)
    conditioning = setup.embed(PROMPTS)

    def gaps(*weights):
        rows = torch.tensor([weights], dtype=torch.float64).expand(4, -1)
        seeds = [numbered_generator(0, i) for i in range(4)]
        return gap_of_runs(setup.sampling, setup.teachers, conditioning, seeds, rows)

    assert gaps(0.5, 0.5).mean().item() == pytest.approx(sum(expected.gaps[0]), rel=1e-3)
    assert gaps(1.0, 0.0).max() < 1e-3
    assert gaps(0.0, 1.0).max() < 1e-3


def test_the_loss_is_the_kl_of_the_soup_from_the_product_at_every_stored_step(desk):
    setup = setup_of(train_batch_size=4, vertex_share=0.0)
    (batch,), _ = collect_steps(setup, 0)
    assert [step.index for step in batch.steps] == [0, 1, 2]
    algorithm = Distillation(setup.settings)
    gaussians = algorithm.gaussians(setup.engine.wrapped, setup.sampling, batch.steps, batch.conditioning)
    for (soup, product), step in zip(gaussians, batch.steps, strict=True):
        found = algorithm.loss(soup, product, step)
        torch.testing.assert_close(soup.variance, step.variance)  # so that the KL is half a squared distance over it
        expected = (soup.mean - step.mean).square().flatten(1).sum(1) / (2 * step.variance.flatten())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert found.max() > 0.1
        assert found.requires_grad


def test_teachers_stay_and_students_start_as_they_are(desk):
    setup = setup_of()
    state = dict(setup.backbone.network.named_parameters())
    of = {name: [key for key in state if f".{name}." in key] for name in ("a", "b", "teacher:a", "teacher:b")}
    for name in ("a", "b"):
        for student, teacher in zip(of[name], of[f"teacher:{name}"], strict=True):
            assert torch.equal(state[student], state[teacher])
    trained = {key for key, value in state.items() if value.requires_grad}
    assert trained == {*of["a"], *of["b"]}
    assert setup.engine.schedule_parameters() == [{}, {}]  # that of b could be trained


# The run


def test_a_run_that_is_resumed_ends_with_the_same_bits(desk, capsys):
    common = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 4, "lr_scheduler": "cosine"}
    run(output_dir="straight", **common)
    Path("resumed").mkdir()
    (newest,) = [path for path in list_checkpoints(Path("straight")) if path.name == "checkpoint-2"]
    capsys.readouterr()
    run(output_dir="resumed", resume_from_checkpoint=str(newest), **common)
    assert "step 2 of 4" in capsys.readouterr().out
    for name in ("a", "b"):
        straight, resumed = (Path(folder, name) for folder in ("straight", "resumed"))
        assert (straight / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
        was, now = (read_adapter(folder).record["distilled"] for folder in (straight, resumed))
        assert was == now


def test_the_configuration_of_a_run_starts_it_again(desk):
    flags = {"max_train_steps": 1, "train_batch_size": 2, "num_validation_images": 1}
    run(output_dir="first", **flags)
    run("--config", "first/config.yaml", output_dir="again", **flags)
    assert Path("first/a", WEIGHTS).read_bytes() == Path("again/a", WEIGHTS).read_bytes()
    records = [read_adapter(f"{folder}/a").record for folder in ("first", "again")]
    assert records[0]["config_sha256"] == records[1]["config_sha256"]
    assert f"set/a/{WEIGHTS}" in records[0]["inputs"]
    run(output_dir="first", overwrite="true", **flags | {"seed": 1})  # replaces its own files
    assert Path("first/a", WEIGHTS).read_bytes() != Path("again/a", WEIGHTS).read_bytes()


def test_what_is_left_is_shown_on_the_way(desk, capsys):
    flags = {"max_train_steps": 2, "train_batch_size": 2, "num_validation_images": 1, "validation_steps": 1}
    run(output_dir="shown", **flags)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["step 1", "step 2"]
    assert all(line.endswith("% is left") for line in lines[:2])
    assert lines[-1].endswith("--rule product --gate inf")


# Refusals


def test_a_set_that_cannot_be_distilled_is_refused(desk):
    create_set("single", ["a"])
    assert "one adapter, 'a'" in refused_by(run, "single")
    assert "adapter_set is ''" in refused_by(run, "--seed", "1")
    assert "nowhere" in refused_by(run, "nowhere")
    assert not Path("outputs").exists()


def test_a_kind_of_lora_that_cannot_be_batched_is_refused_by_name(desk):
    adapter = read_adapter("a")
    part, factors = read_factors(adapter)
    doras = {path: replace(layer, magnitude=torch.ones(len(layer.up))) for path, layer in factors.items()}
    write_adapter(replace(adapter, folder=Path("dora")), doras, part)
    create_set("dora-set", ["dora", "b"])
    assert "adapter 'a' is a DoRA" in refused_by(run, "dora-set")


@pytest.mark.parametrize(
    ("setting", "value", "culprit"),
    [
        ("rank", 8, "rank is 8"),
        ("init_set", "a", "init_set is a"),
        ("guidance", "full", "guidance is full"),
        ("sample_num_steps", 7, "is 7; expected 3"),
    ],
)
def test_what_the_set_decides_is_not_set(desk, setting, value, culprit):
    Path("own.yaml").write_text(yaml.safe_dump({"adapter_set": "set", setting: value}))
    assert culprit in refused_by(run, "--config", "own.yaml")
    with refused(f"unknown flag --{setting}"):
        parse_settings(DistillSettings, [f"--{setting}", str(value)])
