"""Diffusion-DPO on preference pairs of a data set."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import Policy, add_lora
from stepfuse.train.offline import DiffusionDPO, noise_pairs
from stepfuse.train.preference_pairs import PreferencePairs
from stepfuse.train.settings import DPOSettings
from tests.fixtures_tiny import denoiser_of
from tests.fixtures_training import refused_by

REWARDS = """
def slope(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """datasets waits five seconds at the end of every pass, for threads that read ahead."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def run_dpo(run_training):
    return partial(run_training, "dpo")


def picture(colour, size=(20, 16)):
    stream = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(stream, "PNG")
    return stream.getvalue()


def rows(count=12, ties=()):
    """Red is preferred, on one side or the other."""
    return [
        {
            "jpg_0": picture("red" if i % 2 else "blue"),
            "jpg_1": picture("blue" if i % 2 else "red"),
            "label_0": 0.5 if i in ties else float(i % 2),
            "caption": f"prompt {i}",
            "url": "unused",
        }
        for i in range(count)
    ]


def parquet(values, file="pairs.parquet"):
    Dataset.from_list(values).to_parquet(file)
    return file


def folder_of_images():
    folder = Path("pairs")
    folder.mkdir()
    lines = []
    for i, row in enumerate(rows(4)):
        for side in (0, 1):
            (folder / f"{i}-{side}.png").write_bytes(row[f"jpg_{side}"])
        names = {f"jpg_{side}_file_name": f"{i}-{side}.png" for side in (0, 1)}
        lines.append(json.dumps(names | {"label_0": row["label_0"], "caption": row["caption"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


# The loss


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_research_script_of_diffusers(tiny_base, prediction):
    # What examples/research_projects/diffusion_dpo does with a batch, restated on diffusers' own scheduler and peft's
    # own switch: winners and losers stacked, one noise and time a pair, mean squared errors of policy and base.
    loaded = load_pipeline(str(tiny_base))
    loaded.scheduler.register_to_config(prediction_type=prediction)
    unet = loaded.unet
    add_lora(unet, "mine", rank=4, alpha=None, targets=["to_q", "to_v", "conv1"], seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, value in unet.named_parameters():
        if ".lora_B." in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    winner, loser, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    times = torch.tensor([3, 500, 980])
    prompts = ["a red apple", "a cat", "two keys"]
    conditioning = backbone_of(loaded).encode(prompts * 2, [""] * 6)
    beta = 500.0
    settings = DPOSettings(pairs="x", beta=beta, log_prob_reduction="mean", guidance="full")
    denoiser = denoiser_of(unet, loaded.scheduler, guidance="full")
    policy = Policy(denoiser.backbone, ["mine"], [EtaSchedule()])
    noised = noise_pairs(denoiser, winner, loser, noise, times, conditioning)
    sampling = Sampling(
        denoiser=denoiser, objectives=(Expert.adapter("mine", EtaSchedule()),), steps=[], shape=(4, 8, 8)
    )
    algorithm = DiffusionDPO(settings)
    (both,) = algorithm.gaussians(policy, sampling, [noised], conditioning)
    ours = algorithm.loss(*both, noised)
    ours.mean().backward()
    found = {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}
    assert len(found) > 0

    scheduler = DDPMScheduler.from_config(loaded.scheduler.config)
    clean = torch.cat([winner, loser])
    x_t = scheduler.add_noise(clean, noise.repeat(2, 1, 1, 1), times.repeat(2))
    if prediction == "epsilon":
        target = noise.repeat(2, 1, 1, 1)
    else:
        target = scheduler.get_velocity(clean, noise.repeat(2, 1, 1, 1), times.repeat(2))

    def errors():
        predicted = unet(x_t, times.repeat(2), conditioning.positive["prompt_embeds"]).sample
        return functional.mse_loss(predicted, target, reduction="none").mean((1, 2, 3)).chunk(2)

    unet.set_adapter("mine")
    own_winner, own_loser = errors()
    unet.disable_adapters()
    with torch.no_grad():
        base_winner, base_loser = errors()
    difference = (own_winner - own_loser) - (base_winner - base_loser)
    expected = -functional.logsigmoid(-0.5 * beta * difference)
    assert (expected - 0.6931).abs().min() > 1e-3  # the LoRA does something
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-4)
    unet.enable_adapters()
    unet.set_adapter("mine")
    unet.zero_grad()
    own_winner, own_loser = errors()
    (-functional.logsigmoid(-0.5 * beta * ((own_winner - own_loser) - (base_winner - base_loser)))).mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, unet.get_parameter(name).grad, rtol=1e-3, atol=1e-4)


# What is read


def settings(**changes):
    return DPOSettings(**({"pairs": "x", "pairs_shuffle_buffer": 4} | changes))


def taken(pairs, start, count):
    stream = pairs(start)
    return [next(stream) for _ in range(count)]


def colour_of(image):
    return {value: key for key, value in COLOURS.items()}[image.getpixel((0, 0))]


def test_the_preferred_image_is_the_winner_and_ties_are_dropped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = PreferencePairs(parquet(rows(12, ties=(0, 5))), settings())
    found = taken(pairs, 0, 10)
    assert {colour_of(pair.winner()) for pair in found} == {"red"}
    assert {colour_of(pair.loser()) for pair in found} == {"blue"}
    assert {pair.prompt for pair in found} == {f"prompt {i}" for i in range(12)} - {"prompt 0", "prompt 5"}


def test_pairs_come_in_another_order_every_time_round_and_from_any_place_as_they_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = PreferencePairs(parquet(rows()), settings())
    everyone = [pair.prompt for pair in taken(pairs, 0, 24)]
    assert sorted(everyone[:12]) == sorted(everyone[12:]) == sorted(f"prompt {i}" for i in range(12))
    assert everyone[:12] != everyone[12:]
    assert [pair.prompt for pair in taken(pairs, 7, 10)] == everyone[7:17]
    other = PreferencePairs("pairs.parquet", settings(seed=1))
    assert [pair.prompt for pair in taken(other, 0, 12)] != everyone[:12]


def test_a_folder_of_images_with_metadata_holds_the_same_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = taken(PreferencePairs(str(folder_of_images()), settings()), 0, 4)
    assert {pair.prompt for pair in found} == {f"prompt {i}" for i in range(4)}
    assert {colour_of(pair.winner()) for pair in found} == {"red"}


# A run


def losses(folder):
    log = EventAccumulator(f"{folder}/logs/stepfuse")
    log.Reload()
    return [event.value for event in log.Scalars("loss")]


def test_a_run_on_pairs_learns_to_prefer_the_winners_and_goes_on_to_the_same_bits(run_dpo):
    flags = dict(pairs=parquet(rows()), beta=500, log_prob_reduction="mean", learning_rate=0.01, guidance="full")
    flags |= dict(report_to="tensorboard", checkpointing_steps=10, pairs_shuffle_buffer=4)
    run_dpo(max_train_steps=40, output_dir="straight", **flags)
    assert losses("straight")[0] == pytest.approx(0.693147, abs=1e-5)  # the policy is its reference
    assert sum(losses("straight")[-10:]) / 10 < 0.55
    record = read_adapter("straight").record
    assert (record["algorithm"], record["kl"], record["steps"]) == ("diffusion-dpo", None, 40)
    run_dpo(max_train_steps=10, **flags)
    run_dpo(max_train_steps=40, resume_from_checkpoint="latest", **flags)
    straight, resumed = (load_file(f"{name}/pytorch_lora_weights.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_micro_batches_of_pairs_are_one_batch(run_dpo):
    flags = dict(pairs=parquet(rows()), beta=500, log_prob_reduction="mean", adam_epsilon=1e-3, max_train_steps=3)
    run_dpo(train_batch_size=4, output_dir="whole", **flags)
    run_dpo(train_batch_size=1, gradient_accumulation_steps=4, output_dir="split", **flags)
    whole, split = (load_file(f"{name}/pytorch_lora_weights.safetensors") for name in ("whole", "split"))
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"pairs": "nowhere.parquet"}, "nowhere.parquet"),
        ({"pairs": "pairs.parquet", "label_column": "preferred"}, "no column 'preferred'; they have jpg_0, jpg_1"),
        ({"pairs": "pairs.parquet", "image_columns": "jpg_0"}, "image_columns is ['jpg_0']; expected two names"),
        ({"pairs": "pairs.parquet", "max_kl": 1.0}, "max_kl is 1.0; expected none with pairs"),
        ({"pairs": "pairs.parquet", "variance": "learned"}, "variance is learned; expected one that is not trained"),
        ({"pairs": "ties.parquet"}, "hold no pair whose label_0 is 0 or 1"),
        ({"pairs": "broken.parquet"}, "the image for the prompt 'prompt 0' in column 'jpg_1' is not a readable image"),
    ],
)
def test_pairs_that_cannot_be_learned_from_are_named(run_dpo, change, culprit):
    parquet(rows(4))
    parquet(rows(4, ties=range(4)), "ties.parquet")
    parquet([row | {"jpg_1": b"no picture"} for row in rows(1)], "broken.parquet")
    line = refused_by(run_dpo, **{"max_train_steps": 1, "train_batch_size": 1} | change)
    assert culprit in line
