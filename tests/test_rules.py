"""Every rule through the sampler: which of them are the same pixels, what each runs, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.guidance import Branch, Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.best_of_n import CoDe
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.rules.reward_gradient import RewardGradientGuidance
from stepfuse.fuse.rules.weights import WeightSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import load_adapter, read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.rewards.emoji_background import emoji_background
from stepfuse.rewards.registry import load_reward
from tests.fixtures_tiny import ddim, generators, read_lora, refused, save_adapter, save_stable_diffusion

PROMPTS = ["a red apple on a blue background", "a fox on a green background", "a cat on a pink background"]
ETA = {"a": 0.4, "b": 0.9}
RANK = {"a": 2, "b": 2, "wide": 4}
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    made = {"a": ("colourfulness", 0.4), "b": ("compressibility", 0.9), "wide": ("incompressibility", 0.9)}
    for seed, (name, (reward, eta)) in enumerate(made.items()):
        save_adapter(root / name, base, name, rank=RANK[name], seed=seed, variance=EtaSchedule(eta=eta), reward=reward)
    mixed = "weighted:3*colourfulness/5 + 1*compressibility/0.2"
    save_adapter(root / "mix", base, "mix", seed=9, variance=EtaSchedule(eta=0.7), reward=mixed)
    return root


@pytest.fixture(scope="module")
def set_folder(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("sets") / "set"
    create_set(output, [folders / "a", folders / "b"], oracles=[folders / "mix"])
    return output


@pytest.fixture(scope="module")
def sampler(set_folder):
    return FusedSampler.from_pretrained(set_folder)


@pytest.fixture(scope="module")
def equal(sampler):
    """The same set with one variance schedule for all, the base included."""
    schedule = EtaSchedule(eta=0.8)
    return replace(
        sampler, objectives=tuple(replace(o, variance=schedule) for o in sampler.objectives), reference=schedule
    )


def draw(sampler, rule, weights=None, **options):
    """Pixels of three prompts and seeds."""
    return sampler.with_rule(rule).sample(
        PROMPTS,
        weights,
        generator=generators(*range(len(PROMPTS))),
        output_type="pt",
        progress=False,
        **{"num_inference_steps": STEPS} | options,
    )


def alone(sampler, name):
    """One adapter of the set by itself, or with None the base."""
    return draw(sampler, "product", {name: 1}) if name else draw(sampler, "product", strength=0.0)


# The same pixels


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.3])
def test_average_noise_is_the_product_where_variances_are_equal(equal, strength):
    weights = {"a": 0.3, "b": 0.7}
    torch.testing.assert_close(
        draw(equal, "average_noise", weights, strength=strength),
        draw(equal, "product", weights, strength=strength),
        rtol=0,
        atol=1e-5,
    )


def test_average_noise_is_not_the_product_where_variances_differ(sampler):
    weights = {"a": 0.5, "b": 0.5}
    assert (draw(sampler, "average_noise", weights) - draw(sampler, "product", weights)).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["average_noise", "kl", "switch", "systematic", "soup", "soup_factors", "oracle"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_with_all_weight_on_one_adapter_a_rule_is_that_adapter(sampler, rule, name):
    torch.testing.assert_close(draw(sampler, rule, {name: 1}), alone(sampler, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["product", "average_noise", "kl", "switch", "systematic", "soup", "oracle"])
def test_with_strength_0_a_rule_is_the_base(sampler, rule):
    torch.testing.assert_close(draw(sampler, rule, {"a": 1}, strength=0), draw(sampler, "base"), rtol=0, atol=1e-6)


def test_the_base_takes_no_notice_of_weights_and_strength(sampler):
    assert torch.equal(draw(sampler, "base", {"b": 1}, strength=1.5), draw(sampler, "base"))


def test_kl_is_the_product_of_one_objective_with_the_base(sampler):
    assert torch.equal(draw(sampler, "kl", {"b": 1}, strength=1.4), draw(sampler, "product", {"b": 1}, strength=1.4))


def test_code_with_one_candidate_is_the_base(sampler):
    assert torch.equal(draw(sampler, CoDe(candidates=1, block_size=2), {"a": 1}), draw(sampler, "base"))


def test_an_image_does_not_depend_on_its_batch_under_any_rule(sampler):
    rules = [*(name for name in RULES if name not in ("code", "kl", "oracle", "rgg")), CoDe(candidates=2, block_size=2)]
    for rule in rules:
        weights = {"a": 0.5, "b": 0.5}
        together, apart = draw(sampler, rule, weights), draw(sampler, rule, weights, batch_size=1)
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_weights_of_one_image_do_not_touch_the_others(sampler):
    """A batch of three mixtures is the three mixtures."""
    mixtures = [{"a": 1}, {"a": 0.5, "b": 0.5}, {"b": 1}]
    for rule in ("product", "average_noise", "soup", "soup_factors", "switch", "systematic"):
        got = draw(sampler, rule, mixtures)
        for i, weights in enumerate(mixtures):
            torch.testing.assert_close(got[i], draw(sampler, rule, weights)[i], rtol=0, atol=1e-5)


# Merges, against weights merged by hand


def merged_by_hand(base, folders, delta, names):
    """A plain pipeline whose layers hold W + delta of their LoRA factors (alpha is the rank, so no scale)."""
    pipeline = load_pipeline(str(base))
    files = {name: read_lora(folders / name / WEIGHTS) for name in names}
    layers = {key.removesuffix(".lora_A.weight") for key in files[names[0]] if key.endswith(".lora_A.weight")}
    for layer in layers:
        module = pipeline.unet.get_submodule(layer.removeprefix("unet."))
        factors = [(f[f"{layer}.lora_B.weight"], f[f"{layer}.lora_A.weight"]) for f in files.values()]
        with torch.no_grad():
            module.weight += delta(factors)
    return pipeline


@pytest.mark.parametrize(
    ("rule", "delta"),
    [
        ("soup", lambda f: 0.3 * f[0][0] @ f[0][1] + 0.7 * f[1][0] @ f[1][1]),
        ("soup_factors", lambda f: (0.3 * f[0][0] + 0.7 * f[1][0]) @ (0.3 * f[0][1] + 0.7 * f[1][1])),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_soup_predicts_as_weights_merged_by_hand(sampler, base, folders, rule, delta, strength):
    plain = merged_by_hand(base, folders, lambda f: strength * delta(f), ["a", "b"])
    soup = sampler.with_rule(rule)
    plan = soup.plan({"a": 0.3, "b": 0.7}, 3, strength=strength, num_inference_steps=STEPS)
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = sampler.backbone.encode(PROMPTS, [""] * 3)
    with torch.no_grad():
        got = soup.step(x_t, 1, plan, conditioning)
        # guidance "shared": e_u of the base, at 3
        unconditional = sampler.denoiser.run(x_t, plan.steps[1][0], conditioning, [Branch(BASE, "-")])[0]
        conditional = plain.unet(x_t, plan.steps[1][0], conditioning.positive["prompt_embeds"]).sample
    # v = Σ a_i eta_i² of the ancestral variance, the base's eta being 1
    eta = math.sqrt(strength * (0.3 * 0.4**2 + 0.7 * 0.9**2) + 1 - strength)
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    prediction = unconditional + 3.0 * (conditional - unconditional)
    still = torch.zeros_like(x_t)
    expected = scheduler.step(prediction, plan.steps[1][0], x_t, eta=eta, variance_noise=still).prev_sample
    torch.testing.assert_close(got.mean, expected, rtol=0, atol=1e-4)


def test_a_soup_leaves_the_adapters_as_they_were(sampler):
    before = alone(sampler, "a")
    draw(sampler, "soup", {"a": 0.5, "b": 0.5})
    draw(sampler, "soup_factors", {"a": 0.5, "b": 0.5})
    assert torch.equal(alone(sampler, "a"), before)


def test_factors_of_different_rank_are_refused_before_anything_runs(folders, tmp_path):
    create_set(tmp_path / "set", [folders / "a", folders / "wide"])
    uneven = FusedSampler.from_pretrained(tmp_path / "set")
    with refused("'a'", "'wide'", "rank", "soup"):
        draw(uneven, "soup_factors", {"a": 0.5, "wide": 0.5})
    assert draw(uneven, "soup", {"a": 0.5, "wide": 0.5}).isfinite().all()  # the exact one takes any ranks


# What a rule costs


@pytest.mark.parametrize(
    ("rule", "options", "forwards"),
    [
        ("base", {}, 4),
        ("product", {}, 2 * 4),
        ("product", {"strength": 0.5}, 3 * 4),
        ("average_noise", {}, 2 * 4),
        ("switch", {}, 4),
        ("systematic", {}, 4),
        ("soup", {}, 4),
        ("soup_factors", {}, 4),
        (CoDe(candidates=3, block_size=2), {}, 1 + 3 * 3),  # one in the first step, N in each other
    ],
    ids=lambda value: getattr(type(value), "__name__", "") if isinstance(value, CoDe) else None,
)
def test_network_evaluations_an_image(sampler, rule, options, forwards):
    """Without guidance, so that only conditional forwards count; 3 images, 4 steps."""
    plain = replace(sampler, denoiser=replace(sampler.denoiser, guidance=Guidance(source="off")))
    rows = []
    hook = sampler.pipeline.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    try:
        draw(plain, rule, {"a": 0.5, "b": 0.5}, **options)
    finally:
        hook.remove()
    assert sum(rows) == 3 * forwards


# Rewards while sampling


def test_code_gains_what_the_best_of_its_candidates_gains(sampler):
    """Among 8 candidates, one of which is the base's own draw, the chosen one scores no less: a block the whole run."""
    rewards = {name: sampler.with_rule("code").rewards[name] for name in "ab"}
    chosen = draw(sampler, CoDe(candidates=8, block_size=STEPS), {"a": 1})
    gain = rewards["a"](chosen, PROMPTS) - rewards["a"](draw(sampler, "base"), PROMPTS)
    assert (gain >= 0).all()
    assert (gain > 0).any()


def test_reward_gradient_guidance_raises_the_reward_it_follows(sampler):
    reward = sampler.with_rule("rgg").rewards["a"]
    guided = draw(sampler, RewardGradientGuidance(growth=0.1), {"a": 1}, num_inference_steps=8)
    plain = draw(sampler, "base", num_inference_steps=8)
    assert (reward(guided, PROMPTS) > reward(plain, PROMPTS)).all()


# Weights over the steps


def test_weights_over_the_steps_are_those_of_each_step(sampler):
    """All on a for the first half of 4 steps, then all on b: steps 0 and 1 of one plan, 2 and 3 of the other."""
    over = {"a": WeightSchedule(((1.0, 0, 0.5),)), "b": WeightSchedule(((1.0, 0.5, 1.0),))}
    got = draw(sampler, "product", over)
    conditioning = sampler.backbone.encode(PROMPTS, [""] * 3)
    own = generators(0, 1, 2)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in own])
    with torch.no_grad():
        for number, name in enumerate("aabb"):
            x = sampler.step(x, number, sampler.plan({name: 1}, 3, num_inference_steps=4), conditioning).sample(own)
        pixels = sampler.pipeline.vae.decode(x / sampler.pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(got, (pixels / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


# Oracles


def test_the_oracle_of_a_mixture_is_the_adapter_trained_on_it(sampler, folders, base):
    """Weights 3 : 1 name it, as its reward does."""
    pipeline = load_pipeline(str(base))
    adapter = read_adapter(folders / "mix")
    load_adapter(backbone_of(pipeline), adapter, base_fingerprint(pipeline.unet))
    single = replace(
        sampler,
        objectives=(adapter.objective,),
        oracles=(),
        oracle_weights=(),
        denoiser=replace(sampler.denoiser, backbone=backbone_of(pipeline), batched=None),
    )
    got = draw(sampler, "oracle", {"a": 0.75, "b": 0.25})
    torch.testing.assert_close(got, draw(single, "product", {"mix": 1}), rtol=0, atol=1e-6)


def test_a_set_tells_its_oracles_weights(set_folder):
    (oracle,) = load_set(set_folder).oracles
    assert (oracle.adapter.name, oracle.weights) == ("mix", {"a": 0.75, "b": 0.25})


def test_an_oracle_of_a_reward_that_no_adapter_has_is_refused(folders, tmp_path):
    with refused("'mix'", "'compressibility'", "'colourfulness', 'incompressibility'"):
        create_set(tmp_path / "set", [folders / "a", folders / "wide"], oracles=[folders / "mix"])
    with refused("'wide'", "weighted:"):
        create_set(tmp_path / "set", [folders / "a", folders / "b"], oracles=[folders / "wide"])
    assert not (tmp_path / "set").exists()


# Refusals, before anything runs


@pytest.mark.parametrize(
    ("rule", "weights", "options", "culprits"),
    [
        ("oracle", {"a": 0.5, "b": 0.5}, {}, ["a=0.5, b=0.5", "a=0.75, b=0.25", "--oracle"]),
        ("oracle", {"a": WeightSchedule(((1, 0, 0.5),)), "b": WeightSchedule(((1, 0.5, 1),))}, {}, ["stay the same"]),
        ("kl", {"a": 0.5, "b": 0.5}, {}, ["kl", "a=0.5, b=0.5", "product"]),
        ("kl", {"a": 1}, {"strength": 2.5}, ["2.5", "0 to 2"]),
        ("switch", {"a": 1, "b": 1}, {"strength": 1.5}, ["switch", "1.5"]),
        ("systematic", {"a": 2, "b": -1}, {}, ["systematic", "b=-1"]),
        ("code", {"a": 1}, {"strength": 0.5}, ["code", "0.5"]),
        ("rgg", {"a": 1}, {"strength": 0.5}, ["rgg", "0.5"]),
        ("rgg", {"a": 0.5, "b": 0.5}, {}, ["rgg", "'compressibility'", "'b'", "gradient", "code"]),
        ("average_noise", {"b": 1}, {"strength": 30.0}, ["30", "b=1", "step 1 of 4"]),
    ],
)
def test_what_a_rule_cannot_do_is_refused_before_anything_runs(sampler, rule, weights, options, culprits):
    calls = []
    hook = sampler.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with refused(*culprits):
            draw(sampler, rule, weights, **options)
    finally:
        hook.remove()
    assert not calls


@pytest.mark.parametrize("rule", ["code", "rgg"])
def test_rules_that_live_on_noise_are_refused_on_a_deterministic_base(sampler, rule):
    still = replace(sampler, reference=EtaSchedule(eta=0.0))
    with refused(rule, "noise", "--reference_eta"):
        draw(still, rule, {"a": 1})
    draw(still, CoDe(candidates=1), {"a": 1})  # the base itself


def test_a_weighted_reward_is_as_differentiable_as_each_of_its_terms(sampler):
    mixed = load_reward("weighted:1*colourfulness/5 + 1*compressibility/0.2")
    with refused("rgg", "'compressibility'", "'a'"):
        draw(replace(sampler, rewards={"a": mixed}), "rgg", {"a": 1})
    even = load_reward("weighted:1*colourfulness/5")
    assert draw(replace(sampler, rewards={"a": even}), "rgg", {"a": 1}).isfinite().all()


def test_a_differentiable_reward_of_the_prompt_is_taken(sampler):
    assert draw(replace(sampler, rewards={"a": emoji_background}), "rgg", {"a": 1}).isfinite().all()


def test_rewards_without_a_unit_are_not_weighed_against_each_other(sampler):
    unknown = replace(sampler, reward_scales={"a": 5.0})
    with refused("'b'", "reward_scales"):
        draw(unknown, "code", {"a": 0.5, "b": 0.5})
    assert draw(unknown, CoDe(candidates=2), {"b": 1}).isfinite().all()  # alone it needs none


def test_units_are_those_the_oracles_were_trained_in(sampler):
    assert sampler.reward_scales == {"a": 5.0, "b": 0.2}


@pytest.mark.parametrize("rule", ["code", "rgg"])
def test_a_single_step_has_no_rewards_to_go_by(sampler, rule):
    own = sampler.with_rule(rule)
    plan = own.plan({"a": 1}, 1, num_inference_steps=STEPS)
    conditioning = sampler.backbone.encode(PROMPTS[:1], [""])
    with refused("sample", "rewards"):
        own.step(torch.zeros(1, 4, 8, 8), 0, plan, conditioning)


def test_a_rule_without_its_reward_is_refused(folders, base, tmp_path):
    save_adapter(tmp_path / "other", base, "other", reward="mystery")
    create_set(tmp_path / "set", [tmp_path / "other"])
    with refused("'other'", "'mystery'"):
        FusedSampler.from_pretrained(tmp_path / "set", rule="code")
