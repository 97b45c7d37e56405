"""Images are finite, prompts that are cut are reported, and seeds are any that torch takes."""

import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch

from stepfuse.data.seeds import numbered_generator
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.prompt_length import cut_prompts
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.scripts.cli.main import main
from stepfuse.train.conditioning import Embeddings
from stepfuse.train.settings import DPOSettings
from tests.fixtures_sampler import PROMPTS, WEIGHTS, assert_near, save_set, save_three_adapters
from tests.fixtures_tiny import generators, refused, save_adapter, save_stable_diffusion, save_stable_diffusion_xl

LONG = "a fox " + "small red " * 20 + "on blue"
LARGEST = 2**64 - 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    save_set(root / "set", save_three_adapters(root, save_stable_diffusion(root / "base")))
    return root


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    root = tmp_path_factory.mktemp("xl")
    save_adapter(root / "a", save_stable_diffusion_xl(root / "base"), "a")
    return FusedSampler.from_pretrained(create_set(root / "set", [root / "a"]))


@pytest.fixture
def sampler(root):
    return FusedSampler.from_pretrained(root / "set")


def run(*arguments):
    main([str(argument) for argument in arguments])


def error_of(*arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert re.fullmatch(r"error: [^\n]+", str(stop.value.code))
    return str(stop.value.code)


# Finite images


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
@pytest.mark.parametrize("rule", ["product", "switch", "average_noise"])
def test_latents_that_overflow_are_refused_with_the_step(sampler, rule, output_type):
    """e_u + g (e_c - e_u) is infinite at the first step, at time 667 of 3, for a g near the largest float32."""
    options = dict(generator=generators(0, 1), output_type=output_type, progress=False)
    huge = replace(sampler.with_rule(rule), denoiser=replace(sampler.denoiser, guidance=Guidance(scale=3e38)))
    with refused("2 images", PROMPTS[0], "step 1 of 3", "667", "guidance"):
        huge.sample(PROMPTS, WEIGHTS, **options)


def test_the_image_and_step_at_fault_are_named(sampler):
    """NaN is put into one image's latents after the second step."""

    def spoil(number, t, latents):
        if number == 1:
            latents = latents.clone()
            latents[1, 0, 0, 0] = torch.nan
        return latents, True

    options = dict(generator=generators(0, 1), progress=False, after=spoil)
    with refused("the image of prompt", PROMPTS[1], "step 3 of 3"):
        sampler.sample(PROMPTS, WEIGHTS, **options)
    with refused("the image of prompt", PROMPTS[1]):  # in batches of one
        sampler.sample(
            [PROMPTS[1]], WEIGHTS, generator=generators(0), progress=False, after=lambda n, t, x: (x * torch.nan, True)
        )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_pixels_that_overflow_are_refused_before_they_are_clamped(sampler, value):
    """An infinite pixel would be clamped to white."""
    last = [module for module in sampler.pipeline.vae.decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias[0] = value
    with refused("the latents are", "autoencoder", "float32"):
        sampler.sample(PROMPTS, WEIGHTS, generator=generators(0, 1), progress=False)
    assert sampler.sample(PROMPTS, WEIGHTS, output_type="latent", progress=False).isfinite().all()


def test_nothing_is_saved_of_images_that_are_not_finite(root, tmp_path):
    told = error_of(
        "sample", root / "set", "--prompt", "a fox", "--guidance_scale", "3e38", "--output", tmp_path / "out.png"
    )
    assert "a fox" in told
    assert not list(tmp_path.iterdir())


# Prompts that are cut


def test_what_is_cut_of_a_prompt_is_what_the_tokenizer_drops(sampler):
    """Of 16 tokens two are begin and end: what is kept of the text is its first 14."""
    (cut,) = cut_prompts(sampler.backbone, ["a fox", LONG, LONG])
    assert (cut.prompt, cut.limit, cut.tokenizer) == (LONG, 16, "tokenizer")
    tokenizer = sampler.pipeline.tokenizer
    kept = tokenizer.decode(tokenizer(LONG, truncation=True).input_ids[1:-1])
    assert f"{kept} {cut.removed}".split() == LONG.split()


def test_sampling_reports_each_cut_prompt_once_for_each_tokenizer(sampler, xl, caplog, capfd):
    for drawn, tokenizers in ((sampler, ["tokenizer"]), (xl, ["tokenizer", "tokenizer_2"])):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            drawn.sample(["a fox", LONG], negative_prompt=["", LONG + "!"], output_type="latent", progress=False)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 2 * len(tokenizers), told  # a prompt and a negative prompt
        for name in tokenizers:
            assert any(f"{name} takes 16" in line and "on blue" in line for line in told)
    assert "Token indices" not in capfd.readouterr().err


def test_prompts_that_fit_are_not_reported(sampler, caplog):
    with caplog.at_level(logging.WARNING):
        sampler.sample(PROMPTS, output_type="latent", progress=False)
    assert caplog.records == []


def test_training_counts_cut_prompts_once(sampler, caplog):
    embed = Embeddings(sampler.backbone, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        embed.report(["a fox", LONG, LONG + "!"])
        for _ in range(3):
            embed([LONG, "a fox"])
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 prompts")


def test_streamed_prompts_are_reported_at_the_first_and_counted_at_the_end(sampler, caplog):
    embed = Embeddings(sampler.backbone, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            embed(["a fox", f"{LONG} {number}"])
        embed.report_streamed()
    first, last = (record.getMessage() for record in caplog.records)
    assert f"{LONG[:20]}" in first
    assert last.startswith("5 prompts")


def test_a_batch_is_whole_when_the_cache_of_embeddings_is_emptied_for_one_of_its_prompts(sampler, monkeypatch):
    monkeypatch.setattr("stepfuse.train.conditioning.CACHED", 0)  # bytes
    embed = Embeddings(sampler.backbone, torch.device("cpu"))
    embed(["a fox"])
    rows = embed(["a fox", "a cat", "a fox"])
    expected = sampler.backbone.encode(["a fox", "a cat", "a fox"])
    assert rows.positive.keys() == expected.positive.keys()
    for name, value in expected.positive.items():
        assert_near(rows.positive[name], value)


# Seeds


def test_seeds_wrap_at_two_to_the_64th():
    """2^64 - 1 + 1 is 0."""
    first, second = numbered_generator(LARGEST, 0), numbered_generator(LARGEST, 1)
    assert torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=generators(LARGEST)[0]))
    assert torch.equal(torch.randn(3, generator=second), torch.randn(3, generator=generators(0)[0]))


def test_the_largest_seed_draws_several_prompts(root, sampler, tmp_path):
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    run("sample", root / "set", *prompts, "--seed", LARGEST, "--output", tmp_path / "out.png")
    assert (tmp_path / "out.png").is_file()
    shutil.copytree(root / "set", tmp_path / "set")
    run("set", "profile", tmp_path / "set", "--prompts", prompts_file(tmp_path), "--seed", LARGEST)
    run("set", "card", tmp_path / "set", "--seed", LARGEST)


def prompts_file(folder):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder / "prompts.txt"


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_seeds_are_refused(root, tmp_path, seed):
    shutil.copytree(root / "set", tmp_path / "set")
    for command in (
        ("sample", root / "set", "--prompt", "a fox", "--output", tmp_path / "out.png"),
        ("set", "profile", tmp_path / "set"),
        ("set", "card", tmp_path / "set"),
        ("demo", "--output_dir", tmp_path / "demo"),
        ("evaluate", "--world", "gmm", "--output_dir", tmp_path / "world"),
    ):
        assert str(seed) in error_of(*command, f"--seed={seed}")
    with refused("seed", str(seed)):
        DPOSettings(seed=seed)
    assert {file.name for file in tmp_path.iterdir()} == {"set"}
