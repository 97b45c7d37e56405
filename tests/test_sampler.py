"""N adapters on one UNet against N pipelines of diffusers, and the fused step against its closed form."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from stepfuse.fuse.adapter import Objective, write_adapter
from stepfuse.fuse.adapter_set import create_set
from stepfuse.fuse.batched import BatchedAdapters
from stepfuse.fuse.denoiser import Denoiser
from stepfuse.fuse.path import FINAL, NoisePath
from stepfuse.fuse.pipeline import base_fingerprint, encode_prompts, load_pipeline
from stepfuse.fuse.sampler import FusedSampler
from stepfuse.fuse.variance import EtaSchedule, LearnedSchedule, TableSchedule
from stepfuse.scripts.costs import counted_rows
from tests.fixtures_tiny import (
    BETAS,
    LATENT,
    add_random_lora,
    ddim,
    generators,
    refused,
    save_adapter,
    save_stable_diffusion,
)

PROMPTS = ["a red apple on a blue background", "a fox on a green background"]
NEGATIVE = "a dog on a red background"
FIVE = [f"a {animal} on a pink background" for animal in ("cat", "dog", "fox", "lion", "tiger")]
SCALE = 3.0  # of the guidance
ETAS = {"a": 0.3, "b": 0.7, "c": 1.0}
BETA = {"a": 0.1, "b": 0.2, "c": 0.4}
RANKS = {"a": 1, "b": 2, "c": 4}
REFERENCE = 0.6
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
# ᾱ of Stable Diffusion's scheduler.
ALPHA_BAR = np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ETAS):
        save_adapter(
            root / name,
            base,
            name,
            rank=RANKS[name],
            alpha=3,
            seed=seed,
            variance=EtaSchedule(eta=ETAS[name]),
            beta=BETA[name],
            guidance_scale=SCALE,
        )
    return {name: root / name for name in ETAS}


@pytest.fixture(scope="module")
def set_folder(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("sets") / "set"
    create_set(output, list(folders.values()), reference=EtaSchedule(eta=REFERENCE))
    return output


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
    """Call it for the number of forwards so far."""
    calls = []
    hook = sampler.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    yield lambda: len(calls)
    hook.remove()


def changed(sampler, *, reference=None, guidance=None, path=None, **schedules):
    """A sampler of the same models with other schedules, guidance or path."""
    return replace(
        sampler,
        objectives=tuple(replace(o, variance=schedules.get(o.name, o.variance)) for o in sampler.objectives),
        reference=reference or sampler.reference,
        denoiser=replace(
            sampler.denoiser, guidance=guidance or sampler.denoiser.guidance, path=path or sampler.denoiser.path
        ),
    )


def latents(sampler, prompts, weights=None, *, seeds=None, **options):
    seeds = range(len(prompts)) if seeds is None else seeds
    return sampler.sample(
        prompts, weights, generator=generators(*seeds), output_type="latent", progress=False, **options
    )


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


def noise(seed, batch=2):
    return torch.randn((batch, *LATENT), generator=torch.Generator().manual_seed(seed))


def assert_near(got, expected, tolerance=1e-5):
    """Within `tolerance` of the largest value: latents of a random UNet are not of unit size."""
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1, float(expected.abs().max())))


# One UNet against many.


@pytest.mark.parametrize("guidance", ["shared", "full", "off"])
@pytest.mark.parametrize("adapters", [["a", "b", "c", None], ["c", "a"], [None]])
def test_adapters_on_one_unet_predict_what_separate_pipelines_predict(sampler, separate, adapters, guidance):
    x_t, t = noise(0), 501
    conditioning = encode_prompts(sampler.pipeline, PROMPTS, [NEGATIVE] * 2)
    with torch.no_grad():
        got = changed(sampler, guidance=guidance).denoiser.predictions(x_t, t, conditioning, adapters)
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
    with counted_rows(sampler.pipeline.unet) as count:
        together = latents(chosen, PROMPTS, weights, strength=strength)
        assert (count_forwards(), count()) == (3, 3 * rows * len(PROMPTS))
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
        tmp_path / "fresh",
        pipeline.unet,
        Objective(name="fresh", reward="none", variance=EtaSchedule(eta=0.8), beta=0.1),
        base={"name_or_path": str(base)} | fingerprint,
        guidance="shared",
        guidance_scale=SCALE,
        num_inference_steps=3,
        record={},
        pipeline_class=type(pipeline),
    )
    create_set(tmp_path / "set", [tmp_path / "fresh"])
    loaded = FusedSampler.from_pretrained(tmp_path / "set")
    batched = BatchedAdapters(pipeline.unet, ["fresh"])
    denoiser = Denoiser.from_pipeline(pipeline, guidance="shared", guidance_scale=SCALE, batched=batched)
    in_memory = replace(loaded, pipeline=pipeline, denoiser=denoiser)
    for strength in (1.0, 0.5):
        before = latents(in_memory, PROMPTS, strength=strength)
        assert torch.equal(latents(loaded, PROMPTS, strength=strength), before)


def test_a_base_in_bfloat16_takes_the_same_set_and_predicts_nearly_the_same(sampler, set_folder):
    half = FusedSampler.from_pretrained(set_folder, dtype=torch.bfloat16)
    assert half.pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    predictions = []
    for each in (sampler, half):
        conditioning = encode_prompts(each.pipeline, PROMPTS, [""] * 2)
        with torch.no_grad():
            predictions.append(torch.stack(each.denoiser.predictions(noise(1), 501, conditioning, ["a", "b", "c"])))
    exact, rounded = predictions
    assert (rounded - exact).norm() < 0.05 * exact.norm()  # bfloat16 rounds by 2^-9 in each of some ten layers


# The fused step.


def ddim_gaussian(x_t, prediction, t, s, eta, prediction_type):
    """Mean and variance of a DDIM step (arXiv:2010.02502, eqs. 12 and 16) in float64."""
    now, after = ALPHA_BAR[t], ALPHA_BAR[0 if s == FINAL else s]  # set_alpha_to_one is False: ᾱ_0 comes last
    if prediction_type == "epsilon":
        e = prediction
        x_0 = (x_t - math.sqrt(1 - now) * e) / math.sqrt(now)
    else:  # arXiv:2202.00512, appendix D
        x_0 = math.sqrt(now) * x_t - math.sqrt(1 - now) * prediction
        e = math.sqrt(1 - now) * x_t + math.sqrt(now) * prediction
    variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
    return math.sqrt(after) * x_0 + math.sqrt(1 - after - variance) * e, variance


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", [0.4, 1.0, 1.3])
@pytest.mark.parametrize(("number", "t", "s"), [(0, 751, 501), (3, 1, FINAL)])
def test_a_fused_step_is_the_precision_weighted_mean_of_ddim_steps(sampler, prediction_type, strength, number, t, s):
    """1/v* = Σ a_i / v_i, m* = v* Σ a_i m_i / v_i (MSDDA, arXiv:2604.14379) over etas 0.3, 0.7, 1 and the base's."""
    ours = changed(sampler, path=NoisePath.from_scheduler(ddim(prediction_type=prediction_type)))
    x_t = noise(2)
    conditioning = encode_prompts(ours.pipeline, PROMPTS, [""] * 2)
    plan = ours.plan(WEIGHTS, 2, strength=strength, num_inference_steps=4)
    names = ["a", "b", "c", None]
    with torch.no_grad():
        fused = ours.step(x_t, number, plan, conditioning)
        predictions = ours.denoiser.predictions(x_t, t, conditioning, names)
    etas = [0.3, 0.7, 1.0, REFERENCE]
    exponents = [0.5 * strength, 0.3 * strength, 0.2 * strength, 1 - strength]
    parts = [
        ddim_gaussian(x_t.double().numpy(), p.double().numpy(), t, s, eta, prediction_type)
        for p, eta in zip(predictions, etas, strict=True)
    ]
    precision = sum(a / v for a, (_, v) in zip(exponents, parts, strict=True))
    mean = sum(a * m / v for a, (m, v) in zip(exponents, parts, strict=True)) / precision
    assert_near(fused.mean, mean)
    torch.testing.assert_close(fused.variance.flatten(), torch.full((2,), 1 / precision).float(), rtol=1e-4, atol=0)


def test_a_last_step_onto_alpha_1_is_the_limit_of_vanishing_variances(sampler):
    """x_s = x_0 for each expert, and v_i = eta_i² v with v → 0: a mean by a_i / eta_i²."""
    ours = changed(sampler, path=NoisePath.from_scheduler(ddim(set_alpha_to_one=True)))
    x_t, t = noise(3), 1
    conditioning = encode_prompts(ours.pipeline, PROMPTS, [""] * 2)
    with torch.no_grad():
        fused = ours.step(x_t, 3, ours.plan(WEIGHTS, 2, num_inference_steps=4), conditioning)
        predictions = ours.denoiser.predictions(x_t, t, conditioning, ["a", "b", "c"])
    clean = [(x_t - math.sqrt(1 - ALPHA_BAR[t]) * p) / math.sqrt(ALPHA_BAR[t]) for p in predictions]
    shares = [0.5 / 0.3**2, 0.3 / 0.7**2, 0.2 / 1.0**2]
    expected = sum(share * x_0 for share, x_0 in zip(shares, clean, strict=True)) / sum(shares)
    assert_near(fused.mean, expected)
    assert not fused.variance.any()


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_weights_on_rewards_are_multiplied_by_each_beta(sampler, strength):
    """a_i = λ w_i beta_i / Σ w_j beta_j: 0.5·0.1, 0.3·0.2 and 0.2·0.4 make 5 : 6 : 8."""
    plan = sampler.plan(WEIGHTS, 2, strength=strength, weights_on="rewards", num_inference_steps=1)
    got = plan.exponents[0, :3]
    expected = strength * torch.tensor([[5.0], [6.0], [8.0]], dtype=torch.float64).expand(3, 2) / 19
    torch.testing.assert_close(got, expected)
    on_rewards = latents(sampler, PROMPTS, WEIGHTS, weights_on="rewards", strength=strength)
    assert_near(on_rewards, latents(sampler, PROMPTS, {"a": 5, "b": 6, "c": 8}, strength=strength))


# Strength.


def learned_relative_variance(offsets, eta, t, s):
    """v = sigma_s² E p / (1 - p + E p) over the ancestral variance, with two knots at the ends of the time."""
    now, after = ALPHA_BAR[t], ALPHA_BAR[0 if s == FINAL else s]
    ancestral = (1 - after) / (1 - now) * (1 - now / after)
    growth = math.exp(offsets[0] + (offsets[1] - offsets[0]) * t / 999)
    p = eta**2 * ancestral / (1 - after)
    return (1 - after) * growth * p / (1 - p + growth * p) / ancestral


TABLE = (0.5, 0.6, 1.0, 0.7)
OFFSETS = (0.5, 1.5)
STEPS = [(751, 501), (501, 251), (251, 1), (1, FINAL)]  # four steps, leading, offset 1
LEARNED = [learned_relative_variance(OFFSETS, 0.8, t, s) for t, s in STEPS]


@pytest.mark.parametrize(
    ("schedules", "weights", "reference", "objective_precisions"),
    [
        (dict(a=TableSchedule(etas=TABLE)), dict(a=1), 0.8, [1 / eta**2 for eta in TABLE]),
        (
            dict(a=TableSchedule(etas=TABLE), b=EtaSchedule(eta=0.9)),
            dict(a=1, b=1),
            0.8,
            [0.5 / eta**2 + 0.5 / 0.9**2 for eta in TABLE],
        ),
        (
            dict(a=LearnedSchedule(offsets=torch.tensor(OFFSETS), eta=0.8)),
            dict(a=1),
            0.8,
            [1 / r for r in LEARNED],
        ),
    ],
    ids=["table", "table and eta", "learned"],
)
def test_the_largest_strength_is_where_the_precision_vanishes(
    sampler, count_forwards, schedules, weights, reference, objective_precisions
):
    """(1 - λ) / r_ref + λ Σ w_i / r_i > 0, in units of the ancestral precision, at every step."""
    base_precision = 1 / reference**2
    limits = [base_precision / (base_precision - q) if q < base_precision else math.inf for q in objective_precisions]
    largest, number = min((limit, number) for number, limit in enumerate(limits, 1))
    assert 1 < largest < 10
    ours = changed(sampler, reference=EtaSchedule(eta=reference), **schedules)
    total = sum(weights.values())
    named = ", ".join(f"{name}={weights.get(name, 0) / total:g}" for name in "abc")
    with refused(f"step {number} of 4", named, f"{largest:.4g}"):
        latents(ours, PROMPTS, weights, strength=largest * (1 + 1e-5), num_inference_steps=4)
    assert count_forwards() == 0
    latents(ours, PROMPTS, weights, strength=largest * (1 - 1e-5), num_inference_steps=4)
    assert count_forwards() > 0


def test_a_strength_too_large_for_one_image_of_many_names_its_weights(sampler, count_forwards):
    """With eta 1 over a base of eta 0.6, 1 / 0.36 (1 - λ) + λ > 0 ends at λ = 1 / 0.64."""
    weights = [{"a": 1.0}, {"c": 2.0}]
    with refused("a=0, b=0, c=1", "1.56", "step 1 of 3"):
        latents(sampler, PROMPTS, weights, strength=1.6)
    assert count_forwards() == 0
    latents(sampler, PROMPTS, weights, strength=1.55)


def test_deterministic_beside_random_schedules_are_refused(sampler, count_forwards):
    with refused("step 1 of 3", "eta 0"):
        latents(changed(sampler, a=EtaSchedule(eta=0)), PROMPTS, WEIGHTS)
    with refused("step 2 of 4", "eta 0"):
        latents(changed(sampler, b=TableSchedule(etas=(0.5, 0, 1, 1))), PROMPTS, WEIGHTS, num_inference_steps=4)
    no_noise = changed(sampler, reference=EtaSchedule(eta=0))
    with refused("step 1 of 3", "base"):
        latents(no_noise, PROMPTS, WEIGHTS, strength=0.5)
    assert count_forwards() == 0
    assert_near(latents(no_noise, PROMPTS, WEIGHTS), latents(sampler, PROMPTS, WEIGHTS))  # the base has no part
    unused = changed(sampler, a=EtaSchedule(eta=0))  # nor has an objective without weight
    assert_near(latents(unused, PROMPTS, {"b": 1, "c": 1}), latents(sampler, PROMPTS, {"b": 1, "c": 1}))


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (dict(weights={"a": 1, "bright": 1}), ["'bright'", "a, b, c"]),
        (dict(weights={"a": 0, "b": 0.0}), ["a=0"]),
        (dict(weights={}), ["weights", "sum to 0"]),
        (dict(weights={"a": 1, "b": -1}), ["b=-1"]),
        (dict(weights={"a": math.nan}), ["nan"]),
        (dict(weights={"a": math.inf}), ["inf"]),
        (dict(weights=[{"a": 1}, {"b": 0}]), ["b=0"]),
        (dict(weights=[{"a": 1}] * 3), ["3", "2"]),
        (dict(weights=[]), ["0", "2"]),
        (dict(negative_prompt=["one"]), ["1 negative", "2"]),
        (dict(negative_prompt=["one", "two", "three"]), ["3 negative", "2"]),
        (dict(height=18), ["height", "18", "4"]),
        (dict(width=-4), ["width", "-4"]),
        (dict(width=0), ["width", "0"]),
        (dict(num_inference_steps=0), ["0"]),
        (dict(num_inference_steps=1001), ["1001"]),
        (dict(num_inference_steps=-1), ["-1"]),
        (dict(batch_size=0), ["batch_size", "0"]),
        (dict(output_type="png"), ["output_type", "'png'"]),
        (dict(strength=-0.5), ["strength", "-0.5"]),
        (dict(strength=math.nan), ["strength", "nan"]),
        (dict(strength=math.inf), ["strength", "inf"]),
        (dict(weights_on="images"), ["weights_on", "'images'"]),
        (dict(prompts=[]), ["prompts"]),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_any_forward(sampler, count_forwards, arguments, culprits):
    with refused(*culprits):
        sampler.sample(**dict(prompts=PROMPTS, progress=False) | arguments)
    assert count_forwards() == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_generators_is_named_before_any_forward(sampler, count_forwards, count):
    with refused(f"{count} generators", "2"):
        sampler.sample(PROMPTS, generator=generators(*range(count)), progress=False)
    assert count_forwards() == 0


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (dict(rule="average"), "'average'"),
        (dict(guidance="none"), "'none'"),
        (dict(guidance_scale=math.nan), "nan"),
    ],
)
def test_bad_choices_for_a_sampler_are_named(set_folder, arguments, culprit):
    with refused(culprit):
        FusedSampler.from_pretrained(set_folder, **arguments)
