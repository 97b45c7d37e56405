"""What every model family shows, with tiny random models: its images are diffusers' own, and everything runs on it."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.rules.gap_profile import GapProfile
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sampling.shared_forwards import SharedForwards
from stepfuse.fuse.sets.adapter import load_adapter, read_adapter, write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.scripts.evaluation.costs import counted_rows
from stepfuse.scripts.serve.drawing import Limits, read_drawing
from stepfuse.scripts.serve.prepared import prepare
from stepfuse.scripts.serve.served_sets import load_sets
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.lora import Policy, add_lora
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import rollout
from tests.fixtures_families import FAMILIES, save_family
from tests.fixtures_serve import drawn_together
from tests.fixtures_tiny import generators

PROMPTS = ["a red apple", "a cat on a blue background"]  # of different lengths
SCALE = 3.0
REWARDS = "def slope(images, prompts):\n    return images.mean((1, 2, 3))\n"
ETAS = {"a": 0.0, "b": 0.7, "c": 1.0}
TRAINING = {  # enough for a clear gain; DDPO's gradients are noisier
    "ddpo": dict(max_train_steps=8, train_batch_size=32, num_generations=16, learning_rate=0.04, beta=0.001),
    "dpo": dict(max_train_steps=8, train_batch_size=16, learning_rate=0.03, beta=0.01),
}


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return FAMILIES[name]


@pytest.fixture(scope="module")
def base(name, tmp_path_factory):
    return save_family(name, tmp_path_factory.mktemp(name) / "base")


@pytest.fixture(scope="module")
def adapters(family, base, tmp_path_factory):
    """Folders of three adapters of random weights: on attention, and on all other kinds of layers too."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (adapter, eta) in enumerate(ETAS.items()):
        backbone = backbone_of(load_pipeline(str(base)))
        described = describe_base(backbone, str(base))
        targets = [*backbone.targets, *(family.wide if adapter != "a" else ())]
        add_lora(backbone.network, adapter, rank=2, alpha=4, targets=targets, seed=seed)
        randomise(backbone, adapter, seed)
        write_adapter(
            Adapter(
                folder=root / adapter,
                objective=Objective(name=adapter, reward=adapter, variance=EtaSchedule(eta=eta), beta=0.1),
                base=described,
                guidance=family.guidance,
                guidance_scale=SCALE,
                num_inference_steps=3,
            ),
            network_factors(backbone.network, adapter),
            backbone.part,
        )
    return root


@pytest.fixture(scope="module")
def random_set(adapters, tmp_path_factory):
    """Of the two adapters whose steps are random."""
    folder = tmp_path_factory.mktemp("sets") / "random"
    create_set(folder, [adapters / "b", adapters / "c"], base_schedule=EtaSchedule(eta=0.5))
    return folder


@pytest.fixture(scope="module")
def sampler(random_set):
    return FusedSampler.from_pretrained(random_set)


@pytest.fixture(scope="module")
def others(random_set):
    """Samplers of the same set: of separate forwards, and of forwards in pieces."""
    return [FusedSampler.from_pretrained(random_set, **own) for own in ({"forwards": "separate"}, {"rows_at_once": 2})]


def randomise(backbone: Backbone, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in backbone.network.named_parameters():
            if f"lora_B.{adapter}." in key:
                value.normal_(std=0.2, generator=generator)


def theirs(family, pipeline: DiffusionPipeline, steps: int, *seeds: int) -> torch.Tensor:
    """Latents of diffusers' pipeline with Euler steps on linspace(1, 1/N)."""
    pipeline.set_progress_bar_config(disable=True)
    z = pipeline(
        prompt=list(PROMPTS),  # some write their template into it
        height=family.size,
        width=family.size,
        num_inference_steps=steps,
        sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        generator=generators(*seeds),
        output_type="latent",
        **family.call(SCALE),
    ).images
    return family.unpack(pipeline, z, family.size)


def drawn(family, sampler: FusedSampler, prompts=PROMPTS, seeds=(0, 1), **options) -> torch.Tensor:
    size = dict(height=family.size, width=family.size)
    given = dict(output_type="latent", progress=False) | size | options
    return sampler.sample(prompts, generator=generators(*seeds), **given)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """The largest difference, relative to the largest value."""
    assert expected.abs().max() > 0.1
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


@pytest.mark.parametrize("steps", [4, 10])
def test_with_eta_0_images_are_those_of_diffusers_own_pipeline(family, base, adapters, tmp_path, steps):
    """Of the base, and of an adapter as plain `load_lora_weights` loads it."""
    create_set(tmp_path / "set", [adapters / "a"], base_schedule=EtaSchedule(eta=0.0))
    # as diffusers guides: the negative prompt is predicted with the adapter too
    guidance = "full" if family.guidance == "shared" else family.guidance
    sampler = FusedSampler.from_pretrained(tmp_path / "set", guidance=guidance)
    pipeline = load_pipeline(str(base))
    expected = theirs(family, pipeline, steps, 0, 1)
    assert_near(drawn(family, sampler, strength=0.0, num_inference_steps=steps), expected)
    pipeline.load_lora_weights(adapters / "a")
    adapted = theirs(family, pipeline, steps, 0, 1)
    assert (adapted - expected).abs().max() > 1e-3
    assert_near(drawn(family, sampler, num_inference_steps=steps), adapted)


def test_an_image_does_not_depend_on_its_batch(family, sampler):
    together = drawn(family, sampler, [*PROMPTS, "a fox"], (0, 1, 2))
    for row, prompt in enumerate([*PROMPTS, "a fox"]):
        assert_near(drawn(family, sampler, [prompt], (row,)), together[row : row + 1], 2e-6)


@pytest.mark.parametrize("rule", ["product", "soup"])
def test_adapters_in_one_forward_are_those_in_separate_forwards(family, sampler, others, rule):
    weights = [{"b": 1.0, "c": 0.5}, {"c": 1.0}]
    batched, separate, in_pieces = (drawn(family, each.with_rule(rule), weights=weights) for each in (sampler, *others))
    assert_near(batched, separate, 3e-6)
    assert_near(in_pieces, separate, 3e-6)


def test_runs_that_share_forwards_draw_what_each_draws_alone(family, others):
    """Two rules, guidance scales, numbers of steps and lengths of prompts, in the forwards of one engine."""
    separate, _ = others
    scale = separate.denoiser.guidance.scale
    runs = [
        (separate.with_rule("product"), dict(prompts=PROMPTS[:1], seeds=(0,), weights={"b": 1.0, "c": 0.5})),
        (separate.with_rule("soup"), dict(prompts=[PROMPTS[1]] * 2, seeds=(1, 2), num_inference_steps=4)),
    ]
    guidance = replace(separate.denoiser.guidance, scale=scale + 1)
    second = replace(runs[1][0], denoiser=replace(separate.denoiser, guidance=guidance))
    runs[1] = (second, runs[1][1])
    backbone = separate.backbone
    adapters = BatchedAdapters(backbone.network, separate.names, backbone.unbatched)
    forwards = SharedForwards(backbone, adapters, max_rows=4, exact=False)
    draws = [lambda predict, run=run: drawn(family, sharing(run[0], predict), **run[1]) for run in runs]
    for found, (sampler, options) in zip(drawn_together(forwards, draws), runs, strict=True):
        assert_near(found, drawn(family, sampler, **options), 3e-6)


def test_a_set_of_every_family_is_served(family, random_set, sampler):
    (served,), adapters = load_sets([random_set], dtype=torch.float32, device="cpu")
    forwards = SharedForwards(served.sampler.backbone, adapters, max_rows=4, exact=False)
    size = f"{family.size}x{family.size}"
    bodies = [{"prompt": prompt, "size": size, "steps": 3, "seed": seed} for seed, prompt in enumerate(PROMPTS)]
    prepared = [prepare(read_drawing(body, Limits()), {served.name: served}, 4) for body in bodies]
    together = drawn_together(forwards, [each.draw for each in prepared])
    for seed, pixels in enumerate(together):
        expected = drawn(family, sampler, PROMPTS[seed], (seed,), num_inference_steps=3, output_type="pt")
        assert_near(pixels, expected, 1e-5)


def sharing(sampler: FusedSampler, predict) -> FusedSampler:
    return replace(sampler, denoiser=replace(sampler.denoiser, forward_fn=predict))


def test_steps_below_the_gate_cost_one_network(family, sampler):
    """Of three steps the last two are the soup's, which is one network where the product has two."""
    mixture = {"b": 0.5, "c": 0.5}
    measured = dict(num_inference_steps=3, guidance=family.guidance, guidance_scale=SCALE, images=1)
    profile = GapProfile(**measured, mixtures=(mixture,), gaps=((0.9, 0.1, 0.1),))
    gate = replace(sampler, profiles=(profile,), rule=Product(gate=0.5))
    guided = int(family.guidance == "shared")
    with counted_rows(sampler.backbone.network) as counted:
        gated = drawn(family, gate)
    assert counted["rows"] == len(PROMPTS) * (2 + 1 + 1 + 3 * guided)
    assert (gated - drawn(family, sampler)).abs().max() > 1e-5


def test_compiled_blocks_draw_the_same_and_are_compiled_once_for_all_weights(family, random_set, sampler):
    expected = drawn(family, sampler, weights={"b": 0.3, "c": 0.7})
    compiled = FusedSampler.from_pretrained(random_set)
    compiled.compile("regional", rows=8, backend="eager")
    drawn(family, compiled, weights={"b": 0.9, "c": 0.1}, num_inference_steps=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_near(drawn(family, compiled, weights={"b": 0.3, "c": 0.7}), expected, 1e-5)


def test_a_stored_log_probability_is_that_of_the_policy_after_reload(family, base, adapters):
    adapter = read_adapter(adapters / "b")
    for loaded in (0, 1):
        backbone = backbone_of(load_pipeline(str(base)))
        add_lora(backbone.network, "b", rank=2, alpha=4, targets=list(backbone.targets) + list(family.wide), seed=9)
        backbone.network.delete_adapters("b")
        load_adapter(backbone, adapter, describe_base(backbone, str(base)))
        shape = backbone.shape(family.size, family.size)
        path = backbone.path(shape)
        sampling = Sampling(
            denoiser=Denoiser(backbone=backbone, path=path, guidance=Guidance(source=family.guidance, scale=SCALE)),
            objectives=(Expert.adapter("b", adapter.objective.variance),),
            steps=path.steps(3),
            shape=shape,
        )
        conditioning = backbone.encode(PROMPTS, height=family.size, width=family.size)
        if not loaded:
            stored = rollout(sampling, conditioning, generators(0, 1))
            continue
        policy = Policy(backbone, ["b"], [adapter.objective.variance])
        for step in stored.steps:
            ((policy_gaussian, base_gaussian),) = step_gaussians(policy, sampling, [step], conditioning)
            torch.testing.assert_close(policy_gaussian.log_prob(step.x_s), step.log_prob, rtol=1e-5, atol=1e-4)
            assert policy_gaussian.kl(base_gaussian).min() > 1e-4
    assert len(stored.steps) == 2  # the last step has no noise


@pytest.mark.parametrize("algorithm", TRAINING)
def test_training_raises_a_reward_and_its_adapter_is_sampled(family, base, run_training, algorithm, capsys):
    run_training(
        algorithm,
        pretrained_model_name_or_path=base,
        resolution=family.size,
        guidance=family.guidance,
        output_dir="out",
        num_validation_images=16,
        **TRAINING[algorithm] | family.training,
    )
    low, high = map(
        float, re.search(r"95 % interval ([+-][\d.e-]+) to ([+-][\d.e-]+)", capsys.readouterr().out).groups()
    )
    assert 0 < low < high  # of the gain on held-out noise, paired
    create_set("set", ["out"])
    sampler = FusedSampler.from_pretrained("set")
    assert (drawn(family, sampler) - drawn(family, sampler, strength=0.0)).abs().max() > 1e-4
