"""Model families: nothing outside a family's files names its parts, and a new family is one file and one line."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from stepfuse.fuse.backbones.conditioning import Conditioning, join
from stepfuse.fuse.backbones.guidance import Branch, Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import BACKBONES, backbone_class, backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.factors import network_factors, peft_state
from stepfuse.fuse.lora.layers import active_adapter
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import generators, networks
from tests.fixtures_words import WordDiffusionPipeline

ROOT = Path(__file__).parents[1]
REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"
# What only the files of model families may name. `--unet_only` is a flag of the command line.
WORDS = re.compile(r"(?<![A-Za-z])unet(?!_only)|encoder_hidden_states|sample_size|added_cond_kwargs", re.IGNORECASE)
OWN_FILES = re.compile(
    r"fuse/backbones/(?!base|denoiser|conditioning|guidance|loading|fingerprint)\w+\.py|scripts/(benchmark|baselines|emoji|gpu)/|scripts/cli/benchmark\w*\.py"
)


def test_nothing_outside_the_files_of_model_families_names_their_parts():
    found = [
        f"{place}:{number}: {line.strip()}"
        for folder in ("fuse", "train", "scripts")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not OWN_FILES.match(place := file.relative_to(ROOT).as_posix())
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if WORDS.search(line)
    ]
    assert found == []


# A family of one file and one line


def test_a_family_that_is_one_file_and_one_line_is_trained_stored_and_sampled(words, run_training, tmp_path):
    """By the DDPO command, then in a set; with strength 0 and a base of eta 0 images are those of diffusers' Euler."""
    run_training(
        "ddpo", pretrained_model_name_or_path=words, max_train_steps=1, output_dir="mine", objective_name="mine"
    )
    create_set(tmp_path / "set", [tmp_path / "mine"], base_schedule=EtaSchedule(eta=0.0))
    sampler = FusedSampler.from_pretrained(tmp_path / "set", rule="product")
    backbone, prompts = sampler.backbone, ["a red apple", "a cat"]
    assert type(backbone).__name__ == "WordDiffusion"
    options = dict(strength=0.0, num_inference_steps=4, progress=False, output_type="latent")
    base = sampler.sample(prompts, generator=generators(0, 1), **options)
    fused = sampler.sample(prompts, generator=generators(0, 1), **options | dict(strength=1.0))
    assert (fused - base).abs().max() > 1e-4

    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators(0, 1)])
    given = backbone.encode(prompts)
    with torch.no_grad(), active_adapter(backbone.network, None):
        for t in scheduler.timesteps:
            negative, positive = (
                backbone.predict(x, t.expand(2), inputs) for inputs in (given.negative, given.positive)
            )
            x = scheduler.step(negative + 2.0 * (positive - negative), t, x).prev_sample
    torch.testing.assert_close(base, x, rtol=1e-5, atol=1e-5)


def test_its_adapter_is_loaded_by_diffusers_under_the_name_of_its_network(words, run_training, tmp_path):
    run_training(
        "ddpo", pretrained_model_name_or_path=words, max_train_steps=1, output_dir="mine", objective_name="mine"
    )
    file = tmp_path / "mine" / WEIGHTS
    with safe_open(file, framework="pt") as tensors:
        assert all(key.startswith("transformer.transformer_blocks.") for key in tensors.keys())  # noqa: SIM118
    create_set(tmp_path / "set", [tmp_path / "mine"])
    ours = FusedSampler.from_pretrained(tmp_path / "set").denoiser.network
    theirs = load_pipeline(str(words)).transformer
    theirs.load_lora_adapter(load_file(file), prefix="transformer", adapter_name="mine")
    loaded, put = (peft_state(network_factors(network, "mine")) for network in (theirs, ours))
    assert loaded.keys() == put.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in put.items())


def test_an_unknown_family_is_refused_by_name_with_those_there_are(words):
    pipeline = load_pipeline(str(words))
    del BACKBONES["WordDiffusionPipeline"]
    for refused in (lambda: backbone_of(pipeline), lambda: load_pipeline(str(words))):
        with pytest.raises(
            ValueError, match=r"WordDiffusionPipeline.*StableDiffusionPipeline, StableDiffusionXLPipeline"
        ):
            refused()


class DerivedWordPipeline(WordDiffusionPipeline):
    """A user's pipeline, derived from one of a family."""


def test_a_pipeline_derived_from_one_of_a_family_is_loaded_too(words, monkeypatch):
    index = words / "model_index.json"
    index.write_text(index.read_text().replace("WordDiffusionPipeline", "DerivedWordPipeline"))
    monkeypatch.setattr("diffusers.DerivedWordPipeline", DerivedWordPipeline, raising=False)
    pipeline = load_pipeline(str(words))
    assert type(pipeline) is DerivedWordPipeline
    assert backbone_class("DerivedWordPipeline") is type(backbone_of(pipeline)) is BACKBONES["WordDiffusionPipeline"]


@pytest.mark.parametrize("name", ["DDPMPipeline", "UNet2DModel", "utils", "None", "no such class"])
def test_a_name_of_no_family_is_refused_whatever_diffusers_has_under_it(name):
    with pytest.raises(ValueError, match=name):
        backbone_class(name)


# Conditioning


def test_rows_of_different_lengths_are_padded_with_zeros_and_so_are_their_masks():
    def row(tokens):
        return {
            "embeds": torch.full((1, tokens, 2), float(tokens)),
            "mask": torch.ones(1, tokens),
            "pooled": torch.ones(1, 3),
        }

    both = join([Conditioning(positive=row(2), negative=row(1)), Conditioning(positive=row(3), negative=row(1))])
    assert len(both) == 2
    assert both.positive["embeds"][:, :, 0].tolist() == [[2.0, 2.0, 0.0], [3.0, 3.0, 3.0]]
    assert both.positive["mask"].tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert both.inputs("-+")["mask"].tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert both.repeat(2)[torch.tensor([3])].positive["pooled"].shape == (1, 3)


# Guidance


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (Guidance(source="shared"), [(None, "-"), ("a", "+"), (None, "+")]),
        (Guidance(source="full"), [("a", "-"), (None, "-"), ("a", "+"), (None, "+")]),
        (Guidance(source="off"), [("a", "+"), (None, "+")]),
        (Guidance(source="shared", scale=1.0), [("a", "+"), (None, "+")]),
        (Guidance(source="full", scale=1.0), [("a", "+"), (None, "+")]),
    ],
)
def test_guidance_needs_no_more_raw_predictions_than_its_equation_has(guidance, branches):
    assert [(branch.network.adapter, branch.kind) for branch in guidance.branches(networks("a", None))] == branches


@pytest.mark.parametrize("source", ["shared", "full"])
def test_guided_predictions_of_some_rows_are_combined_row_by_row(source):
    """e_u + 3 (e_c - e_u), with e_u = 10 · row and e_c = 1: -20 · row + 3."""
    guidance, rows = Guidance(source=source, scale=3.0), torch.tensor([2, 0])
    branches = guidance.branches(networks("a"), [rows])

    def raw(branch: Branch):
        wanted = torch.arange(3.0) if branch.rows is None else branch.rows.float()
        return (wanted * 10 if branch.kind == "-" else torch.ones(len(wanted))).reshape(-1, 1, 1, 1)

    (guided,) = guidance.combine(
        branches, [raw(branch) for branch in branches], lambda e_u, e_c, g: e_u + g * (e_c - e_u)
    )
    assert guided.flatten().tolist() == [-37.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(source="both"), "'both'"),
        (dict(scale=float("nan")), "finite"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Guidance(**options)
