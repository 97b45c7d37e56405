"""What a run learns from: scored while it goes on sampling, in the unit it was given or fitted."""

import json
import statistics
import threading
from pathlib import Path

import pytest
import torch

from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.rewards.compressibility import compressibility
from stepfuse.rewards.reward_name import label_terms, parse_reward
from stepfuse.rewards.scoring_queue import ScoringQueue
from stepfuse.rewards.shaping import Shaping, fit_shaping
from stepfuse.rewards.weighted import Weighted
from stepfuse.train.algorithms import DDPO, DPO
from stepfuse.train.loop import train_adapter
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_rewards import photographs
from tests.fixtures_tiny import read_lora, refused
from tests.fixtures_training import forget_accelerator, save_tiny_pipeline

ALGORITHMS = {"dpo": (DPO, DPOSettings), "ddpo": (DDPO, DDPOSettings)}
REWARDS = """
def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))

def thousands(images, prompts):
    return 1000 * images[:, 1].mean((1, 2))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, base):
    """Train with some settings; the adapter that comes out."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red apple\na cat\ntwo keys\n")
    Path("rewards.py").write_text(REWARDS)

    def go(algorithm="ddpo", **changes):
        kind, settings = ALGORITHMS[algorithm]
        values = dict(
            pretrained_model_name_or_path=str(base),
            prompts="prompts.txt",
            reward="rewards.py:slope",
            objective_name="mine",
            output_dir="out",
            report_to="none",
            sample_num_steps=3,
            sample_guidance_scale=2.0,
            num_validation_images=2,
            train_batch_size=4,
            gradient_accumulation_steps=2,
            max_train_steps=2,
            learning_rate=0.01,
            beta=0.1,
        )
        if algorithm == "ddpo":
            values["num_generations"] = 4
        values |= changes
        forget_accelerator()
        own = settings(**values)
        return read_adapter(train_adapter(own, kind(own)))

    return go


def weights(folder):
    return read_lora(Path(folder) / "pytorch_lora_weights.safetensors")


# While it goes on sampling.


def test_a_queue_keeps_the_order_and_runs_beside_its_caller():
    queue, seen, release = ScoringQueue(ahead=3), [], threading.Event()

    def call(i):
        release.wait(30)
        seen.append(i)
        return torch.tensor(float(i))

    futures = [queue.submit(lambda i=i: call(i)) for i in range(3)]
    assert not any(future.done() for future in futures)  # and this thread is here
    release.set()
    assert [future.result().item() for future in futures] == seen == [0, 1, 2]
    queue.close()


def test_a_queue_lets_no_more_wait_than_it_was_told():
    queue, release, count = ScoringQueue(ahead=2), threading.Event(), []

    def fill():
        for i in range(5):
            queue.submit(lambda: release.wait(30))
            count.append(i)

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join(0.5)
    assert len(count) == 2
    release.set()
    thread.join(30)
    assert len(count) == 5
    queue.close()


def test_what_a_call_raises_is_raised_at_its_result_and_nothing_more_is_called():
    queue, called, release = ScoringQueue(), [], threading.Event()

    def broken():
        release.wait(30)
        raise ValueError("no such colour")

    first, second = queue.submit(broken), queue.submit(lambda: called.append(1))
    release.set()
    for future in (first, second):
        with refused("no such colour"):
            future.result()
    with refused("no such colour"):  # a rollout that goes on asking ends here, not at its end
        queue.submit(lambda: called.append(1))
    queue.close()
    assert not called


def test_a_batch_is_scored_while_the_next_is_sampled(run, monkeypatch):
    """The first reward of a step waits until the UNet runs again: were sampling to wait for it, neither would end."""
    from diffusers import UNet2DConditionModel

    forward, ran_again = UNet2DConditionModel.forward, threading.Event()
    asked = threading.Event()

    def counted(*arguments, **options):
        if asked.is_set():
            ran_again.set()
        return forward(*arguments, **options)

    def waits(images, prompts):
        if len(images) == 4 and not asked.is_set():  # not the two of the validation
            asked.set()
            assert ran_again.wait(60)
        return images.mean((1, 2, 3))

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    monkeypatch.setattr("stepfuse.train.scoring.load_reward", lambda name, device, dtype: waits)
    run(max_train_steps=1)
    assert ran_again.is_set()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scoring_aside_changes_no_number(algorithm, run):
    run(algorithm, output_dir="aside")
    run(algorithm, output_dir="at-once", async_scoring=False)
    aside, at_once = weights("aside"), weights("at-once")
    assert all(torch.equal(aside[name], at_once[name]) for name in aside)
    assert any(tensor.abs().max() > 0 for name, tensor in aside.items() if "lora_B" in name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("aside", [True, False])
def test_a_reward_that_fails_names_the_step_that_caused_it(algorithm, aside, run):
    def broken(images, prompts):
        calls.append(len(images))
        if len(calls) > 3:
            raise RuntimeError("no such colour")
        return images.mean((1, 2, 3))

    calls = []
    # One call for the validation and, in DDPO, two a step: the fourth is in step 2; in DPO all are in step 1.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepfuse.train.scoring.load_reward", lambda name, device, dtype: broken)
        with refused("step 2" if algorithm == "ddpo" else "step 1", "no such colour"):
            run(algorithm, async_scoring=aside)
    assert not Path("out/objective.json").exists()


# In which unit.


def test_shaping_shifts_scales_and_clips_and_fits():
    scores = torch.tensor([1.0, 2.0, 6.0])
    assert str(Shaping(shift=-0.25, scale=4)) == "(reward + 0.25) / 4"
    assert str(Shaping(shift=2, scale=4, clip=[-0.2, 0.5])) == "(reward - 2) / 4, clipped to [-0.2, 0.5]"
    assert Shaping(shift=2, scale=4, clip=[-0.2, 0.5])(scores).tolist() == pytest.approx([-0.2, 0, 0.5])
    fitted = fit_shaping(scores)  # mean 3, squares 4, 1, 9
    assert (fitted.shift, fitted.scale) == (3, pytest.approx((14 / 3) ** 0.5))
    with refused("5", "3 images"):
        fit_shaping(torch.full((3,), 5.0))


def test_a_shaped_reward_is_stored_with_the_adapter_and_leaves_the_validation_as_it_is(run):
    plain, shaped = run(output_dir="plain"), run(output_dir="shaped", reward_shift=0.25, reward_scale=0.5)
    assert plain.objective.shaping == Shaping()
    assert shaped.objective.shaping == Shaping(shift=0.25, scale=0.5)
    assert shaped.record["validation"]["before"] == plain.record["validation"]["before"]  # in the reward's own unit
    # Advantages are normalised, so that shift and scale change nothing of them.
    for name, tensor in weights("plain").items():
        torch.testing.assert_close(weights("shaped")[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_margin_is_in_the_unit_of_the_shaped_reward(run):
    run("dpo", output_dir="plain", margin=0.02)
    run("dpo", output_dir="shaped", margin=0.04, reward_scale=0.5)
    run("dpo", output_dir="other", margin=0.04)
    plain, shaped, other = (weights(folder) for folder in ("plain", "shaped", "other"))
    assert all(torch.equal(plain[name], shaped[name]) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_a_clipped_reward_tells_nothing_apart_beyond_its_bounds(run):
    run("dpo", reward_clip=[50.0, 60.0])  # all rewards are below: every pair is a tie
    assert all(tensor.abs().max() == 0 for name, tensor in weights("out").items() if "lora_B" in name)


def test_a_reward_is_fitted_on_images_of_the_base_and_a_resumed_run_keeps_it(run, monkeypatch):
    calls = []

    def recording(images, prompts):
        values = images[:, 0].mean((1, 2))
        calls.append(values.tolist())
        return values

    monkeypatch.setattr("stepfuse.train.scoring.load_reward", lambda name, device, dtype: recording)
    options = dict(fit_reward=6, checkpointing_steps=1)
    straight = run(output_dir="straight", **options)
    fitted = calls[0] + calls[1]  # before anything else, a micro-batch at a time
    assert len(fitted) == 6
    assert straight.objective.shaping.shift == pytest.approx(statistics.fmean(fitted))
    assert straight.objective.shaping.scale == pytest.approx(statistics.pstdev(fitted))
    run(max_train_steps=1, **options)
    calls.clear()
    resumed = run(resume_from_checkpoint="latest", **options)
    assert [len(values) for values in calls] == [4, 4, 2]  # a step, and the validation
    assert resumed.objective == straight.objective
    assert all(torch.equal(weights("out")[name], tensor) for name, tensor in weights("straight").items())


def test_a_run_is_not_resumed_with_another_fit(run):
    run(max_train_steps=1, checkpointing_steps=1, fit_reward=4)
    for changes in (dict(reward="rewards.py:thousands"), dict(fit_reward=5), dict(reward_clip=[0.0, 1.0])):
        with refused("'rewards.py:slope' on 4 images"):
            run(**({"fit_reward": 4} | changes), resume_from_checkpoint="latest")
    run(output_dir="unfitted", max_train_steps=1, checkpointing_steps=1)
    with refused("fit_reward", "begun"):
        run(output_dir="unfitted", fit_reward=4, resume_from_checkpoint="latest")


def test_the_terms_of_a_weighted_reward_are_fitted_one_by_one(run):
    adapter = run(reward="weighted:3*rewards.py:slope + 1*rewards.py:thousands", fit_reward=6)
    terms = parse_reward(adapter.objective.reward).terms
    assert [(term.name, term.weight) for term in terms] == [("rewards.py:slope", 0.75), ("rewards.py:thousands", 0.25)]
    assert terms[1].scale > 100 * terms[0].scale > 0
    assert adapter.objective.shaping == Shaping()
    # What is recorded of the validation is in the unit of that very reward.
    same = run(reward=adapter.objective.reward, output_dir="same")
    assert same.record["validation"]["before"] == adapter.record["validation"]["before"]
    with refused("'rewards.py:slope'", "scale"):
        run(reward=adapter.objective.reward, output_dir="twice", fit_reward=6)
    assert not Path("twice").exists()


def test_fitted_scales_are_the_deviations_of_each_term():
    pixels, prompts = photographs(8)[0]
    rewards = {"a": compressibility, "b": lambda images, prompts: images.mean((1, 2, 3))}
    weighted = Weighted(parse_reward("weighted:2*a + 6*b").terms, rewards.__getitem__)
    name, shaping = weighted.fit(weighted.terms_of(pixels, prompts), Shaping(scale=2))
    assert shaping == Shaping(scale=2)
    fitted = parse_reward(name).terms
    for term, weight in zip(fitted, (0.25, 0.75), strict=True):
        values = rewards[term.name](pixels, prompts).tolist()
        assert term.scale == pytest.approx(statistics.pstdev(values), rel=1e-5)
        assert term.weight == weight
    assert label_terms(fitted) == name
    with refused("'a'", "scale"):
        weighted.with_terms(fitted).fit(weighted.terms_of(pixels, prompts), Shaping())
    with refused("'a'", "8 images"):
        weighted.fit(torch.ones(8, 2), Shaping())


def test_decoupled_advantages_learn_from_the_small_term_too(run):
    """One term a thousand times the other: summed first, the small one is drowned; normalised first, it is not."""
    reward = "weighted:1*rewards.py:slope + 1*rewards.py:thousands"
    run(reward="weighted:1*rewards.py:thousands", output_dir="large")
    run(reward=reward, output_dir="sum")
    run(reward=reward, output_dir="gdpo", multi_objective_aggregation="normalize_then_sum")
    large, summed, gdpo = (weights(folder) for folder in ("large", "sum", "gdpo"))

    def apart(a, b):
        return sum((a[name] - b[name]).abs().sum().item() for name in a)

    assert apart(summed, large) < 0.2 * apart(gdpo, large)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(reward_scale=0.0), "scale"),
        (dict(reward_clip=[1.0]), "clip"),
        (dict(fit_reward=1), "fit_reward"),
        (dict(fit_reward=4, reward_scale=2.0), "fit_reward"),
        (dict(multi_objective_aggregation="normalize_then_sum"), "weighted:"),
        (
            dict(
                reward="weighted:1*compressibility",
                reward_clip=[0.0, 1.0],
                multi_objective_aggregation="normalize_then_sum",
            ),
            "reward_clip",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, culprit):
    with refused(culprit):
        DDPOSettings(**changes)


def test_an_adapter_without_shaping_is_read_as_unshaped(run):
    run()
    values = json.loads(Path("out/objective.json").read_text())
    assert Shaping(**values.pop("shaping")) == Shaping()
    Path("out/objective.json").write_text(json.dumps(values))
    assert read_adapter("out").objective.shaping == Shaping()
    Path("out/objective.json").write_text(json.dumps(values | {"shaping": {"scale": -1}}))
    with refused("objective.json", "scale"):
        read_adapter("out")
