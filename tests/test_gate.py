"""The gate between soup and product: the first-order identity, the measured gap, and what it saves."""

import math
from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import EtaSchedule, TableSchedule
from stepfuse.fuse.lora.layers import lora_layers
from stepfuse.fuse.rules.averages import Soup
from stepfuse.fuse.rules.gap_profile import GapProfile, profile_from_dict, profile_to_dict
from stepfuse.fuse.rules.merged_product import MergedProduct
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.product import Product, gated, soup_weights
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.fuse.sampling.measure_gaps import describe_gaps, measure_gaps, mixtures_of
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.edit import add_profile
from stepfuse.scripts.evaluation.costs import counted_rows
from tests.fixtures_tiny import ddim, generators, networks, refused, save_adapter, save_stable_diffusion

ETAS = {"a": 0.3, "b": 0.7, "c": 1.0}
PROMPTS = ["a red apple on a blue background", "a fox on a green background"]
THIRDS = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    base = save_stable_diffusion(root / "base")
    for seed, (name, eta) in enumerate(ETAS.items()):
        save_adapter(root / name, base, name, seed=seed, variance=EtaSchedule(eta=eta))
    create_set(root / "set", [root / name for name in ETAS], base_schedule=EtaSchedule(eta=0.6))
    return root / "set"


@pytest.fixture(scope="module")
def sampler(set_folder):
    return FusedSampler.from_pretrained(set_folder)


def profile(gaps, mixtures=(THIRDS,), steps=3, guidance_scale=3.0):
    return GapProfile(
        num_inference_steps=steps,
        guidance="shared",
        guidance_scale=guidance_scale,
        images=1,
        mixtures=tuple(mixtures),
        gaps=tuple(tuple(row) for row in gaps),
    )


def draw(sampler, weights=None, *, rule=None, prompts=PROMPTS, **options):
    chosen = sampler if rule is None else sampler.with_rule(rule)
    seeds = generators(*range(len(prompts)))
    return chosen.sample(prompts, weights, generator=seeds, output_type="latent", progress=False, **options)


# The identity.


def linear_step(etas, weights, *, strength=1.0, t=500, s=250, prediction_type="epsilon"):
    """A network linear in its merged weights, e_b = e_0 + Σ b_i d_i: what every network is to first order."""
    path = NoisePath.from_scheduler(ddim(prediction_type=prediction_type))
    torch.manual_seed(0)
    e_0, *d = torch.randn(len(etas), 2, 5, dtype=torch.float64)

    def predict(x_t, t, networks, images, rows):
        predictions = [e_0 + sum(w * d["ab".index(name)] for name, w in network.weights) for network in networks]
        return [e if own is None else e[own] for e, own in zip(predictions, rows, strict=True)]

    table = torch.tensor(weights, dtype=torch.float64)[None, :, None].expand(1, -1, 2)
    plan = Plan(
        path=path,
        steps=[(t, s)],
        objectives=[Expert.adapter(name, EtaSchedule(eta=eta)) for name, eta in zip("ab", etas, strict=False)],
        base=Expert.base(EtaSchedule(eta=etas[-1])),
        weights=table,
        strength=strength,
    )
    x_t = torch.randn(2, 5, dtype=torch.float64)
    return FusionStep(
        plan=plan, step_index=0, x_t=x_t, predict_fn=predict, uniforms=torch.zeros(2, 3), images=torch.arange(2)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("etas", "weights", "strength", "s"),
    [
        ((0.3, 0.9, 0.6), (0.5, 0.5), 1.0, 250),
        ((0.3, 0.9, 0.6), (0.8, 0.2), 0.7, 250),
        ((0.3, 0.9, 0.6), (0.8, 0.2), 1.2, 0),
        ((0.8, 0.8, 0.8), (0.5, 0.5), 1.0, -1),
        ((0.0, 0.0, 0.0), (0.4, 0.6), 1.0, 250),
    ],
)
def test_for_a_network_linear_in_its_weights_the_soup_is_the_product(prediction_type, etas, weights, strength, s):
    """Different variances, the base taking part, extrapolation, the last step, no noise at all: mean and variance."""
    step = linear_step(etas, weights, strength=strength, s=s, prediction_type=prediction_type)
    product = Product().fuse(step)
    soup = gated(step, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(soup.mean, product.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(soup.variance, product.variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("etas", [(0.3, 0.9, 0.6), (0.8, 0.8, 0.8)])
def test_an_infinite_gate_takes_one_network_at_every_step_and_is_what_adapters_are_distilled_through(etas):
    step = linear_step(etas, (0.7, 0.3))
    asked = []

    def predict(x_t, t, networks, images, rows):
        asked.extend(networks)
        return step.predict_fn(x_t, t, networks, images, rows)

    found = Product(gate=math.inf).fuse(replace(step, predict_fn=predict))
    expected = gated(step, torch.ones(2, dtype=torch.bool))
    trained = MergedProduct().fuse(step)
    assert [network.merge for network in asked] == ["weights"]
    for one in (found, trained):
        assert torch.equal(one.mean, expected.mean)
        assert torch.equal(one.variance, expected.variance)
    soup = Soup().fuse(step)
    same = torch.allclose(soup.mean, trained.mean) and torch.allclose(soup.variance, trained.variance)
    assert same == (len(set(etas)) == 1)


def test_with_equal_variances_the_soup_has_the_users_weights():
    weights = soup_weights(linear_step((0.7, 0.7, 0.7), (0.8, 0.2)))
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64))


def test_with_unequal_variances_the_surer_expert_weighs_more():
    """u_i ∝ w_i / eta_i²: with 0.3 and 0.9 at one half each, nine to one but for k_i."""
    weights = soup_weights(linear_step((0.3, 0.9, 0.6), (0.5, 0.5)))
    assert weights[0, 0] > 0.8
    assert weights[:, 0].sum().item() == pytest.approx(1)


# What a gate does.


def test_without_a_gap_small_enough_the_gate_is_the_product(sampler):
    closed = replace(sampler, profiles=(profile([[1.0, 1.0, 1.0]]),), rule=Product(gate=0.5))
    assert torch.equal(draw(closed, THIRDS), draw(sampler, THIRDS))


@pytest.mark.parametrize(("gaps", "rows"), [((0.1, 0.9, 0.5), 2 + 4 + 2), ((9.0, 9.0, 9.0), 3 * 4), ((0, 0, 0), 3 * 2)])
def test_steps_below_the_gate_cost_one_network(sampler, gaps, rows):
    """One row an image for the soup or three for the adapters, and one for guidance."""
    gate = replace(sampler, profiles=(profile([gaps]),), rule=Product(gate=0.5))
    with counted_rows(sampler.pipeline.unet) as counted:
        images = draw(gate, THIRDS)
    assert counted["rows"] == rows * len(PROMPTS)
    product = draw(sampler, THIRDS)
    assert torch.equal(images, product) == (min(gaps) > 0.5)
    # Nearer than the soup of the users' weights, which knows nothing of variances.
    assert (images - product).norm() < 0.5 * (draw(sampler, THIRDS, rule="soup") - product).norm()


def test_images_of_one_adapter_or_another_mixture_keep_their_own(sampler):
    """Of one batch: an image with all the weight on one adapter, one whose pair has a small gap, one whose has not."""
    mixtures, gaps = ({"a": 0.5, "b": 0.5}, {"b": 0.5, "c": 0.5}), ([0.1] * 3, [0.9] * 3)
    gate = replace(sampler, profiles=(profile(gaps, mixtures),), rule=Product(gate=0.5))
    weights = [{"c": 1.0}, {"a": 0.3, "b": 0.7}, {"b": 0.3, "c": 0.7}]
    prompts = [*PROMPTS, PROMPTS[0]]
    together, product = draw(gate, weights, prompts=prompts), draw(sampler, weights, prompts=prompts)
    same = [bool((one - other).abs().max() < 1e-5) for one, other in zip(together, product, strict=True)]
    assert same == [True, False, True]
    (alone,) = gate.sample([PROMPTS[1]], weights[1], generator=generators(1), output_type="latent", progress=False)
    torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=1e-5)


def test_a_gap_is_the_largest_measured_of_the_objectives_in_use():
    names = ["a", "b", "c"]
    measured = profile([[0.1, 0.2, None], [0.5, 0.1, 0.3]], [{"a": 0.5, "b": 0.5}, {"a": 0.2, "b": 0.4, "c": 0.4}])
    rows = [[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [1.2, -0.2, 0.0]]
    weights = torch.tensor(rows, dtype=torch.float64).T[None].expand(3, -1, -1)
    inf = math.inf
    expected = torch.tensor(
        [[0.1, 0.5, inf, 0.0, inf], [0.2, 0.2, inf, 0.0, inf], [inf, inf, inf, 0.0, inf]], dtype=torch.float64
    )
    assert torch.equal(measured.at(weights, names), expected)


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        (dict(num_inference_steps=4), ["4 steps", "stepfuse set profile SET --steps 4 --guidance shared"]),
        (dict(strength=1.5), ["gate 0.5", "strength 1.5"]),
    ],
)
def test_a_gate_that_was_not_measured_is_refused_before_anything_runs(sampler, options, culprits):
    gate = replace(sampler, profiles=(profile([[0.1] * 3]),), rule=Product(gate=0.5))
    with counted_rows(sampler.pipeline.unet) as counted, refused(*culprits):
        draw(gate, THIRDS, **options)
    assert counted["rows"] == 0


def test_a_gate_over_doras_is_refused(tmp_path):
    """A DoRA is not linear in its weight: it has no soup to measure, nor to take."""
    base = save_stable_diffusion(tmp_path / "base")
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, base, name, seed=seed)
    create_set(tmp_path / "set", [tmp_path / name for name in "ab"])
    sampler = FusedSampler.from_pretrained(tmp_path / "set")
    for layer in lora_layers(sampler.pipeline.unet):
        layer.use_dora["b"] = True
    gate = replace(sampler, profiles=(profile([[0.1] * 3], [{"a": 0.5, "b": 0.5}]),), rule=Product(gate=0.5))
    with counted_rows(sampler.pipeline.unet) as counted:
        with refused("'b'", "DoRA"):
            draw(gate, {"a": 0.5, "b": 0.5})
        with refused("'b'", "DoRA"):
            measure_gaps(sampler, PROMPTS, progress=False)
    assert counted["rows"] == 0


def test_a_gate_of_another_guidance_is_refused(sampler):
    gate = replace(sampler, profiles=(profile([[0.1] * 3], guidance_scale=7.0),), rule=Product(gate=0.5))
    with refused("3 steps with guidance shared of scale 3.0", "the set has 3 steps with guidance shared of scale 7.0"):
        draw(gate, THIRDS)
    with refused("the set has none; sample without a gate", "--guidance_scale 3"):
        draw(replace(gate, profiles=()), THIRDS)


# Measuring.


def test_a_gap_is_the_kl_from_the_products_step_to_the_soups(sampler):
    """Worked anew at every step from the two Gaussians' own means, |m - m'|² / (2 v): their variances are one."""
    seen = []

    def observe(step, gaussian, conditioning, rows):
        soup = gated(step, torch.ones(len(step.x_t), dtype=torch.bool))
        torch.testing.assert_close(soup.variance, gaussian.variance)
        seen.append(((soup.mean - gaussian.mean) ** 2 / (2 * gaussian.variance)).flatten(1).sum(1).mean().item())

    draw(sampler, THIRDS, observe=observe)
    measured = measure_gaps(sampler, PROMPTS, progress=False)
    assert measured.mixtures[0] == pytest.approx(THIRDS)
    assert list(measured.gaps[0]) == pytest.approx(seen, rel=1e-4)
    assert min(seen) > 0
    halves = measure_gaps(sampler, PROMPTS, progress=False, batch_size=1)
    assert list(halves.gaps[0]) == pytest.approx(seen, rel=1e-3)


def test_a_profile_is_of_the_default_weights_and_every_pair():
    default = {"a": 0.5, "b": 0.25, "c": 0.25}
    pairs = [{"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5}, {"b": 0.5, "c": 0.5}]
    assert mixtures_of(["a", "b", "c"], default) == [default, *pairs]
    assert mixtures_of(["a", "b"], {"a": 0.3, "b": 0.7}) == [{"a": 0.3, "b": 0.7}]
    assert mixtures_of(["a"], {"a": 1.0}) == []


def test_a_profile_stays_with_its_set_and_one_of_the_same_steps_takes_its_place(set_folder):
    first, second = profile([[0.1, 0.2, None]]), profile([[0.3, 0.4, 0.5]])
    other = profile([[0.5] * 4], steps=4)
    for one in (first, other, second):
        changed = add_profile(set_folder, one)
    assert changed == load_set(set_folder)
    assert changed.profiles == (other, second)
    assert profile_from_dict(profile_to_dict(first)) == first
    gate = FusedSampler.from_pretrained(set_folder, rule=Product(gate=0.35))
    assert [bool(gap <= 0.35) for gap in gate.plan(THIRDS, 1).gaps[:, 0]] == [True, False, False]


def test_a_described_gate_takes_in_the_steps_it_names():
    """Three gaps, 0.0123, 0.456 and 7.89: with all three below, 3 rows instead of 9 and their sum lost, 8.3582."""
    text = describe_gaps(profile([[0.0123, 7.89, 0.456]]))
    *_, last = text.splitlines()
    gate, soups, rows, lost = (float(word) for word in last.split())
    assert (soups, rows, lost) == (3, 3, 8.4)
    assert 7.89 <= gate < 8
    assert "1: 0.333 a + 0.333 b + 0.333 c" in text


def test_sets_that_have_no_gap_are_refused(sampler):
    one = replace(sampler, objectives=sampler.objectives[:1], default_weights={"a": 1.0})
    with refused("one objective", "'a'", "a gate too"):
        measure_gaps(one, PROMPTS, progress=False)
    with refused("two objectives or more", "'a' alone", "without a gate"):
        draw(replace(one, rule=Product(gate=0.5)), {"a": 1.0})
    still = tuple(replace(o, variance=TableSchedule(etas=(0.0,))) for o in sampler.objectives)
    deterministic = replace(sampler, objectives=still, reference=EtaSchedule(eta=0.0))
    with refused("no noise"):
        measure_gaps(deterministic, PROMPTS, progress=False)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (dict(gaps=((0.1, 0.2),)), "3 steps with gaps of 2"),
        (dict(gaps=((0.1, -0.2, 0.1),)), "-0.2"),
        (dict(gaps=((0.1, math.nan, 0.1),)), "nan"),
        (dict(gaps=()), "gaps of 0"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(changes, culprit):
    with refused(culprit):
        replace(profile([[0.1] * 3]), **changes)


# Guidance in an interval.


def test_outside_its_interval_guidance_costs_nothing_and_the_prediction_is_the_conditional_one(sampler):
    """Three steps, 0 to 2/3 of them guided: 2 rows, 2 rows, 1 row; and 0 to 0.01 is guidance in the first alone."""
    with counted_rows(sampler.pipeline.unet) as counted:
        draw(sampler, {"a": 1}, guidance_interval=(0.0, 2 / 3))
        assert counted["rows"] == (2 + 2 + 1) * len(PROMPTS)
    seen = {}

    def observe(step, gaussian, conditioning, rows):
        guided = step.step_index == 1
        denoiser = sampler.denoiser if guided else replace(sampler.denoiser, guidance=Guidance(source="off"))
        (prediction,) = denoiser.predictions(step.x_t, step.t, conditioning, networks("a"))
        expected = step.transition(prediction, step.variance(step.plan.objectives[0])).mean
        torch.testing.assert_close(gaussian.mean, expected, atol=1e-5, rtol=1e-5)
        seen[step.step_index] = guided

    draw(sampler, {"a": 1}, guidance_interval=(0.3, 0.6), observe=observe)
    assert seen == {0: False, 1: True, 2: False}


def test_a_whole_interval_is_the_default_and_scale_1_is_no_guidance(sampler):
    assert torch.equal(draw(sampler, THIRDS, guidance_interval=(0.0, 1.0)), draw(sampler, THIRDS))
    one = replace(sampler, denoiser=replace(sampler.denoiser, guidance=Guidance(scale=1.0)))
    off = replace(sampler, denoiser=replace(sampler.denoiser, guidance=Guidance(source="off")))
    with counted_rows(sampler.pipeline.unet) as counted:
        assert torch.equal(draw(one, THIRDS), draw(off, THIRDS))
    assert counted["rows"] == 2 * 3 * 3 * len(PROMPTS)


def test_a_run_needs_one_denoiser_with_guidance_and_one_without(sampler, monkeypatch):
    made = []
    monkeypatch.setattr(Denoiser, "__post_init__", lambda self: made.append(self.guidance.source))
    draw(sampler, THIRDS, num_inference_steps=5, guidance_interval=(0.2, 0.6))
    assert made == ["shared", "off"]  # not one a step


def test_a_plan_of_an_interval_that_is_none_cannot_be_made(sampler):
    plan = sampler.plan(THIRDS, 1, num_inference_steps=4, guidance_interval=(0.25, 0.75))
    assert [plan.is_guided(step_index) for step_index in range(4)] == [False, True, True, False]
    with refused("guidance_interval 0.75-0.25"):
        replace(plan, guidance_interval=(0.75, 0.25))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.2, 1.5)])
def test_an_interval_that_is_none_is_refused(sampler, interval):
    with refused("guidance_interval", "0.2-0.8"):
        draw(sampler, THIRDS, guidance_interval=interval)
