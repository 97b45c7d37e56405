"""N adapters on one UNet against N pipelines of diffusers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.scripts.evaluation.costs import counted_rows
from tests.fixtures_sampler import (
    ETAS,
    PROMPTS,
    REFERENCE,
    SCALE,
    WEIGHTS,
    assert_near,
    changed,
    counted_forwards,
    latents,
    noise,
    save_set,
    save_three_adapters,
)
from tests.fixtures_tiny import (
    LATENT,
    add_random_lora,
    ddim,
    generators,
    networks,
    save_stable_diffusion,
)

NEGATIVE = "a dog on a red background"
FIVE = [f"a {animal} on a pink background" for animal in ("cat", "dog", "fox", "lion", "tiger")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    return save_three_adapters(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture(scope="module")
def set_folder(folders, tmp_path_factory):
    return save_set(tmp_path_factory.mktemp("sets") / "set", folders)


@pytest.fixture(scope="module")
def sampler(set_folder):
    return FusedSampler.from_pretrained(set_folder)


@pytest.fixture(scope="module")
def separate(base, folders):
    """Pipelines of diffusers: the base under None, and one an adapter, loaded as anyone would."""

    def load(folder=None):
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)
        if folder:
            pipeline.load_lora_weights(folder)
        return pipeline

    return {None: load()} | {name: load(folder) for name, folder in folders.items()}


@pytest.fixture
def count_forwards(sampler):
    with counted_forwards(sampler) as count:
        yield count


def direct_prediction(pipelines, name, x_t, t, prompts, guidance):
    """e_u + g (e_c - e_u) from whole, separate pipelines."""

    def call(pipeline, embeddings):
        with torch.no_grad():
            return pipeline.unet(x_t, t, encoder_hidden_states=embeddings).sample

    positive, negative = pipelines[None].encode_prompt(prompts, "cpu", 1, True, [NEGATIVE] * len(prompts))
    conditional = call(pipelines[name], positive)
    if guidance == "off":
        return conditional
    unconditional = call(pipelines[None if guidance == "shared" else name], negative)
    return unconditional + SCALE * (conditional - unconditional)


def diffusers_trajectory(predict: Callable, *, eta: float, seed: int, steps: int = 3):
    """The loop of every diffusers pipeline, by its DDIM scheduler, around another prediction."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = ddim()
    scheduler.set_timesteps(steps)
    x_t = torch.randn((1, *LATENT), generator=generator)
    for t in scheduler.timesteps:
        x_t = scheduler.step(predict(x_t, t), t, x_t, eta=eta, generator=generator).prev_sample
    return x_t


# One UNet against many.


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
@pytest.mark.parametrize("adapters", [["a", "b", "c", None], ["c", "a"], [None]])
def test_adapters_on_one_unet_predict_what_separate_pipelines_predict(sampler, separate, adapters, guidance):
    x_t, t = noise(0), 501
    conditioning = sampler.backbone.encode(PROMPTS, [NEGATIVE] * 2)
    with torch.no_grad():
        got = changed(sampler, guidance=guidance).denoiser.predictions(x_t, t, conditioning, networks(*adapters))
    expected = [direct_prediction(separate, name, x_t, t, PROMPTS, guidance) for name in adapters]
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs)
    for i, one in enumerate(expected):  # or the comparison would show nothing
        assert all((one - other).abs().mean() > 1e-2 for other in expected[:i])


@pytest.mark.parametrize("guidance", ["full", "off"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_one_adapter_of_weight_1_draws_what_diffusers_draws_with_it(sampler, separate, eta, guidance):
    ours = changed(sampler, a=EtaSchedule(eta=eta), guidance=guidance)
    size = dict(height=24, width=16)
    expected = separate["a"](
        PROMPTS,
        num_inference_steps=4,
        eta=eta,
        guidance_scale=SCALE if guidance == "full" else 1,
        negative_prompt=[NEGATIVE] * 2,
        generator=generators(5, 6),
        output_type="latent",
        **size,
    ).images
    got = latents(ours, PROMPTS, {"a": 2}, seeds=(5, 6), num_inference_steps=4, negative_prompt=NEGATIVE, **size)
    assert_near(got, expected)


def test_images_are_those_that_diffusers_decodes(sampler, separate):
    ours = changed(sampler, guidance="full")
    options = dict(num_inference_steps=2)
    theirs = dict(eta=ETAS["b"], guidance_scale=SCALE, **options)
    arrays = separate["b"](PROMPTS, generator=generators(0, 1), output_type="np", **theirs).images
    pixels = ours.sample(PROMPTS, {"b": 1}, generator=generators(0, 1), output_type="pt", progress=False, **options)
    assert_near(pixels, arrays.transpose(0, 3, 1, 2))
    pictures = separate["b"](PROMPTS, generator=generators(0, 1), output_type="pil", **theirs).images
    drawn = ours.sample(PROMPTS, {"b": 1}, generator=generators(0, 1), progress=False, **options)
    for got, expected in zip(drawn, pictures, strict=True):
        assert got.size == expected.size == (16, 16)
        difference = np.asarray(got, dtype=int) - np.asarray(expected, dtype=int)
        assert abs(difference).max() <= 1


@pytest.mark.parametrize("guidance", ["shared", "full"])
def test_strength_0_draws_what_the_base_draws_alone(sampler, separate, guidance):
    expected = separate[None](
        PROMPTS,
        num_inference_steps=3,
        eta=REFERENCE,
        guidance_scale=SCALE,
        generator=generators(0, 1),
        output_type="latent",
    ).images
    assert_near(latents(changed(sampler, guidance=guidance), PROMPTS, strength=0.0), expected)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_weight_1_on_one_objective_is_that_adapter_alone_with_its_own_eta(sampler, separate, name):
    """Under shared guidance, which no pipeline of diffusers has: their scheduler around two of their UNets."""

    def predict(x_t, t):
        return direct_prediction(separate, name, x_t, t, PROMPTS[:1], "shared")

    expected = diffusers_trajectory(predict, eta=ETAS[name], seed=3)
    assert_near(latents(sampler, PROMPTS[:1], {name: 1.0}, seeds=[3], negative_prompt=NEGATIVE), expected)


@pytest.mark.parametrize("strength", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_with_equal_variances_fusion_averages_the_predictions_of_separate_pipelines(sampler, separate, eta, strength):
    """DB-MPA (arXiv:2505.18547), and its extrapolation from the base."""
    exponents = {name: strength * weight for name, weight in WEIGHTS.items()} | {None: 1 - strength}

    def predict(x_t, t):
        return sum(
            a * direct_prediction(separate, name, x_t, t, PROMPTS[:1], "shared") for name, a in exponents.items()
        )

    expected = diffusers_trajectory(predict, eta=eta, seed=4)
    schedule = EtaSchedule(eta=eta)
    ours = changed(sampler, a=schedule, b=schedule, c=schedule, reference=schedule)
    got = latents(ours, PROMPTS[:1], WEIGHTS, seeds=[4], strength=strength, negative_prompt=NEGATIVE)
    assert_near(got, expected)


@pytest.mark.parametrize(
    ("guidance", "weights", "strength", "rows", "networks"),
    [
        ("shared", WEIGHTS, 1.0, 3 + 1, 4),
        ("shared", WEIGHTS, 0.5, 3 + 1 + 1, 4),  # the base's own prediction comes with the unconditional one
        ("shared", {"a": 1, "c": 1}, 1.0, 2 + 1, 3),
        ("shared", {"a": 1, "b": 0}, 1.0, 1 + 1, 2),
        ("shared", [{"a": 1}, {"b": 1}], 1.0, 1 + 1, 3),
        ("shared", WEIGHTS, 0.0, 1 + 1, 1),
        ("full", WEIGHTS, 1.0, 3 * 2, 3),
        ("full", {"b": 1}, 0.5, 2 * 2, 2),
        ("off", WEIGHTS, 1.0, 3, 3),
    ],
)
def test_a_step_is_one_forward_of_a_row_for_each_objective_in_use_and_one_for_guidance(
    sampler, count_forwards, guidance, weights, strength, rows, networks
):
    """An image has no row of an objective whose weight is 0 for it; without batching each network runs by itself."""
    chosen = changed(sampler, guidance=guidance)
    with counted_rows(sampler.pipeline.unet) as counted:
        together = latents(chosen, PROMPTS, weights, strength=strength)
        assert (count_forwards(), counted["rows"]) == (3, 3 * rows * len(PROMPTS))
    chosen = replace(chosen, denoiser=replace(chosen.denoiser, batched=None))
    torch.testing.assert_close(latents(chosen, PROMPTS, weights, strength=strength), together, atol=1e-5, rtol=1e-5)
    assert count_forwards() == 3 + 3 * networks


# Seeds, batches, files.


def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler):
    alone = torch.cat([latents(sampler, [prompt], WEIGHTS, seeds=[i]) for i, prompt in enumerate(FIVE)])
    for batch_size in (1, 2, 5):
        assert_near(latents(sampler, FIVE, WEIGHTS, batch_size=batch_size), alone)
    shuffled = latents(sampler, FIVE[::-1], WEIGHTS, seeds=[4, 3, 2, 1, 0], batch_size=3)
    assert_near(shuffled.flip(0), alone)
    assert (latents(sampler, FIVE[:1], WEIGHTS, seeds=[9]) - alone[:1]).abs().mean() > 1e-1


def test_one_generator_for_all_images_gives_the_same_images_for_every_batch_size(sampler):
    def draw(seed, batch_size):
        generator = torch.Generator().manual_seed(seed)
        return sampler.sample(FIVE, generator=generator, batch_size=batch_size, output_type="latent", progress=False)

    first = draw(0, 5)
    assert_near(draw(0, 2), first)
    assert (draw(1, 5) - first).abs().mean() > 1e-1
    assert min((first[i] - first[j]).abs().mean() for i in range(5) for j in range(i)) > 1e-1


def test_weights_and_negative_prompts_of_their_own_equal_separate_calls(sampler):
    weights = [{"a": 1.0}, {"b": 1.0}, {"a": 0.2, "b": 0.3, "c": 0.5}, {"c": 4.0}, {"a": 1, "c": 1}]
    negatives = ["", NEGATIVE, "", PROMPTS[0], ""]
    together = latents(sampler, FIVE, weights, batch_size=5, negative_prompt=negatives, strength=1.2)
    for i in range(5):
        alone = latents(sampler, [FIVE[i]], weights[i], seeds=[i], negative_prompt=negatives[i], strength=1.2)
        assert_near(together[i : i + 1], alone)


def test_weights_are_normalised_and_those_left_out_are_those_of_the_set(sampler):
    expected = latents(sampler, PROMPTS, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert_near(latents(sampler, PROMPTS, {"a": 6, "b": 6, "c": 6}), expected)
    assert_near(latents(sampler, PROMPTS), expected)


def test_a_set_loaded_twice_draws_the_same_bits(sampler, set_folder):
    again = FusedSampler.from_pretrained(set_folder)
    assert torch.equal(latents(again, PROMPTS, WEIGHTS), latents(sampler, PROMPTS, WEIGHTS))


def test_an_adapter_saved_and_loaded_draws_the_bits_it_drew_before(base, tmp_path):
    pipeline = load_pipeline(str(base))
    fingerprint = base_fingerprint(pipeline.unet)
    add_random_lora(pipeline, "fresh", rank=2, alpha=5, seed=7)
    write_adapter(
        Adapter(
            folder=tmp_path / "fresh",
            objective=Objective(name="fresh", reward="none", variance=EtaSchedule(eta=0.8), beta=0.1),
            base={"name_or_path": str(base)} | fingerprint,
            guidance="shared",
            guidance_scale=SCALE,
            num_inference_steps=3,
        ),
        network_factors(pipeline.unet, "fresh"),
        "unet",
    )
    create_set(tmp_path / "set", [tmp_path / "fresh"])
    loaded = FusedSampler.from_pretrained(tmp_path / "set")
    batched = BatchedAdapters(pipeline.unet, ["fresh"])
    denoiser = replace(loaded.denoiser, backbone=backbone_of(pipeline), batched=batched)
    in_memory = replace(loaded, denoiser=denoiser)
    for strength in (1.0, 0.5):
        before = latents(in_memory, PROMPTS, strength=strength)
        assert torch.equal(latents(loaded, PROMPTS, strength=strength), before)


def test_a_base_in_bfloat16_takes_the_same_set_and_predicts_nearly_the_same(sampler, set_folder):
    half = FusedSampler.from_pretrained(set_folder, dtype=torch.bfloat16)
    assert half.pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    predictions = []
    for each in (sampler, half):
        conditioning = each.backbone.encode(PROMPTS, [""] * 2)
        with torch.no_grad():
            predictions.append(
                torch.stack(each.denoiser.predictions(noise(1), 501, conditioning, networks("a", "b", "c")))
            )
    exact, rounded = predictions
    assert (rounded - exact).norm() < 0.05 * exact.norm()  # bfloat16 rounds by 2^-9 in each of some ten layers
