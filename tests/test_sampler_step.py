"""The fused step against its closed form, the largest strength, and what a sampler refuses."""

import math

import pytest
import torch

from stepfuse.fuse.diffusion.noise_path import FINAL, NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from tests.fixtures_sampler import (
    ALPHA_BAR,
    PROMPTS,
    REFERENCE,
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
    ddim,
    generators,
    networks,
    refused,
    save_stable_diffusion,
)


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    return save_set(root / "set", save_three_adapters(root, save_stable_diffusion(root / "base")))


@pytest.fixture(scope="module")
def sampler(set_folder):
    return FusedSampler.from_pretrained(set_folder)


@pytest.fixture
def count_forwards(sampler):
    with counted_forwards(sampler) as count:
        yield count


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
    conditioning = ours.backbone.encode(PROMPTS, [""] * 2)
    plan = ours.plan(WEIGHTS, 2, strength=strength, num_inference_steps=4)
    experts = networks("a", "b", "c", None)
    with torch.no_grad():
        fused = ours.step(x_t, number, plan, conditioning)
        predictions = ours.denoiser.predictions(x_t, t, conditioning, experts)
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
    conditioning = ours.backbone.encode(PROMPTS, [""] * 2)
    with torch.no_grad():
        fused = ours.step(x_t, 3, ours.plan(WEIGHTS, 2, num_inference_steps=4), conditioning)
        predictions = ours.denoiser.predictions(x_t, t, conditioning, networks("a", "b", "c"))
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
