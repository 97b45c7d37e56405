"""The KL divergence to the base by denoising step: logged, recorded, and shown as a picture and on the card."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepfuse.data.emoji import ADAPTER_SET
from stepfuse.data.kl_steps import KL_PICTURE, draw_kl_steps, largest_step
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.card import write_card
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.manifest import MANIFEST, check_schema
from stepfuse.train.kl_by_step import kl_tag, vertex_means
from stepfuse.train.loop import train_adapter
from stepfuse.train.step_measures import StepMeasures
from tests.fixtures_tiny import refused
from tests.fixtures_training import Watched, forget_accelerator, two_epochs

REWARDS = "def slope(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))\n"


def logged(folder="out"):
    log = EventAccumulator(f"{folder}/logs/stepfuse", size_guidance={"images": 0})
    log.Reload()
    return log


def nats(folder="out"):
    return [step["nats"] for step in read_adapter(folder).record["kl_steps"]]


@pytest.mark.parametrize("algorithm", ["dpo", "ddpo"])
def test_the_kl_of_every_step_is_logged_recorded_and_drawn(run_training, algorithm, capsys):
    run_training(algorithm, max_train_steps=2, report_to="tensorboard")
    log, record = logged(), read_adapter("out").record
    for index, step in enumerate(record["kl_steps"]):
        values = [event.value for event in log.Scalars(f"kl_step/{index + 1:02d}")]
        assert values[0] == 0  # the policy is the base
        assert values[1] == pytest.approx(step["nats"], rel=1e-6)
    assert sum(nats()) == pytest.approx(record["kl"], rel=1e-5)
    assert record["kl"] > 0
    levels = [(step["sigma_t"], step["sigma_s"]) for step in record["kl_steps"]]
    assert len(levels) == 3
    assert 1 > levels[0][0] > levels[0][1] == pytest.approx(levels[1][0])  # of DDIM, which ends on alpha 0.9996
    assert levels[2][1] == pytest.approx(0.029, abs=1e-3)
    index, share = largest_step(nats())
    assert f"{100 * share:.0f} % of it in denoising step {index + 1} of 3" in capsys.readouterr().out
    (event,) = log.Images("kl_steps")
    with Image.open(Path("out", KL_PICTURE)) as picture:
        assert (event.step, event.width, event.height) == (2, *picture.size)


def test_the_kl_of_a_step_is_that_of_its_gaussians(run_training, tiny_base):
    settings = two_epochs(tiny_base)
    watched = Watched(settings)
    forget_accelerator()
    train_adapter(settings, watched)
    assert nats() == pytest.approx(watched.kl[-3:], rel=1e-5)  # of the last update, one a denoising step


def test_steps_that_are_skipped_are_not_trained_on_and_have_no_kl(run_training, tiny_base):
    trained = []

    class Indices(Watched):
        def loss(self, policy, reference, step):
            trained.append((step.index, step.t))
            return super().loss(policy, reference, step)

    settings = two_epochs(tiny_base, skip_first_steps=1, skip_last_steps=2, sample_num_steps=5)
    forget_accelerator()
    train_adapter(settings, Indices(settings))
    assert {index for index, _ in trained} == {1, 2}
    assert {t for _, t in trained} == {601, 401}  # of 801, 601, …, 1
    assert [value is not None for value in nats()] == [False, True, True, False, False]


def test_a_step_that_is_not_drawn_keeps_what_was_measured_last(run_training):
    run_training(
        "ddpo", max_train_steps=6, sample_num_steps=4, train_timestep_fraction=0.25, report_to="tensorboard", seed=1
    )
    log = logged()
    last = {}
    for index in range(4):
        if (tag := f"kl_step/{index + 1:02d}") in log.Tags()["scalars"]:
            last[index] = log.Scalars(tag)[-1]
    assert len(last) > 1
    assert len({event.step for event in last.values()}) == len(last)  # one step at a time
    assert {k: value for k, value in enumerate(nats()) if value is not None} == pytest.approx(
        {k: event.value for k, event in last.items()}, rel=1e-6
    )


def test_it_survives_a_resumed_run(run_training):
    flags = dict(checkpointing_steps=1, train_timestep_fraction=0.4)
    run_training("ddpo", max_train_steps=4, output_dir="straight", **flags)
    run_training("ddpo", max_train_steps=2, **flags)
    run_training("ddpo", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert nats() == nats("straight")
    progress = json.loads(Path("out/checkpoint-4/progress.json").read_text())
    assert progress["kl_steps"] == nats()


def test_the_best_policy_has_its_own(run_training):
    run_training("ddpo", max_train_steps=3, checkpointing_steps=1, load_best_model_at_end="true")
    record = read_adapter("out").record
    assert record["best"]["step"] == record["steps"]
    assert sum(nats()) == pytest.approx(record["kl"], rel=1e-5)


def test_without_a_kl_none_is_reported(run_training):
    run_training("ddpo", max_train_steps=1, beta=0.0, report_to="tensorboard")
    assert not [tag for tag in logged().Tags()["scalars"] if tag.startswith("kl_step")]
    assert read_adapter("out").record["kl_steps"] == []
    assert not Path("out", KL_PICTURE).exists()


# The picture and the card

STEPS = [
    {"sigma_t": 1 - k / 4, "sigma_s": 0.75 - k / 4, "nats": value} for k, value in enumerate([1.0, None, 3.0, 0.0])
]


def test_the_largest_step_and_its_share():
    assert largest_step([step["nats"] for step in STEPS]) == (2, 0.75)
    assert largest_step([None, 0.0]) is largest_step([]) is None


def test_the_picture_has_a_line_for_each_policy():
    one, two = draw_kl_steps({"a": STEPS}), draw_kl_steps({"a": STEPS, "b": [*STEPS, *STEPS]})
    assert one.size == two.size
    colours = [{tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3)} for picture in (one, two)]
    blue, vermilion = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)  # of Okabe and Ito
    assert [blue in found for found in colours] == [True, True]
    assert [vermilion in found for found in colours] == [False, True]


def test_the_card_of_a_set_names_the_step_and_has_the_picture(run_training):
    run_training("dpo", max_train_steps=2)
    create_set("set", ["out"])
    trained_set = Path("set")
    loaded = load_set(trained_set)
    steps = loaded.adapters[0].record["kl_steps"]
    assert steps == read_adapter("out").record["kl_steps"]
    card = write_card(trained_set, loaded).read_text()
    index, share = largest_step([step["nats"] for step in steps])
    levels = "σ {sigma_t:.3g} to {sigma_s:.3g}".format(**steps[index])
    assert f"`slope` spends {100 * share:.0f} % of its KL in denoising step {index + 1} of 3 ({levels})." in card
    assert f"]({KL_PICTURE})" in card
    with Image.open(trained_set / KL_PICTURE) as picture:
        picture.verify()
    copied = create_set("copy", [trained_set / "slope"])
    assert copied.adapters[0].record["kl_steps"] == steps
    create_set(trained_set, ["out"], overwrite=True)
    assert {file.name for file in trained_set.iterdir()} == {MANIFEST, "slope"}


@pytest.mark.parametrize("wrong", [[{"nats": 1.0}], [STEPS[0] | {"nats": -1.0}], [STEPS[0] | {"note": "<b>"}], "1"])
def test_a_record_that_is_none_is_refused(wrong):
    file = ADAPTER_SET / MANIFEST
    values = json.loads(file.read_text())
    values["adapters"][0]["training"]["kl_steps"] = STEPS
    check_schema(file, values)
    values["adapters"][0]["training"]["kl_steps"] = wrong
    with refused("kl_steps"):
        check_schema(file, values)


def test_the_kl_at_a_vertex_is_of_its_images_and_stands_for_all_steps_that_can_be_trained_on():
    forget_accelerator()
    measures = StepMeasures(Accelerator(cpu=True), 4, ["a", "b"])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    measures.add("wxyz", torch.zeros(4), torch.tensor([1.0, 10.0, 100.0, 3.0]), 1, None, weights)
    measures.add("wxyz", torch.zeros(4), torch.tensor([2.0, 20.0, 200.0, 4.0]), 3, None, weights)
    # a: 2 and 3 nats in the two steps that were drawn, of three; b: 10 and 20
    expected = {kl_tag(1, "a"): 2, kl_tag(3, "a"): 3, "kl/a": 7.5, kl_tag(1, "b"): 10, kl_tag(3, "b"): 20, "kl/b": 45}
    assert vertex_means(measures.read().vertices, learnable=3) == expected
    forget_accelerator()
