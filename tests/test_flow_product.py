"""The product of two policies on the embedded flow base against quadrature, at every step of a run."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule, TableSchedule
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.lora import add_lora
from tests.fixtures_tiny import generators, networks

BASE = "emoji-flow"
PROMPTS = ["a red apple", "a cat on a blue background"]
WEIGHTS = {"a": 0.7, "b": 0.3}
ETAS = {"a": (0.4, 0.8, 0.6, 0.9), "b": (1.0, 0.9, 0.5, 0.7), None: (0.7,) * 4}  # of four steps; None is the base
STRENGTH = 1.2  # so that the base takes part, with 1 - 1.2


class Seen(NamedTuple):
    t: float
    s: float
    x_t: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    for seed, name in enumerate("ab"):
        backbone = backbone_of(load_pipeline(BASE))
        add_lora(backbone.network, name, rank=2, alpha=4, targets=list(backbone.targets), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for key, value in backbone.network.named_parameters():
            if "lora_B" in key:
                value.data.normal_(std=0.3, generator=generator)
        adapter = Adapter(
            folder=root / name,
            objective=Objective(name=name, reward=name, variance=TableSchedule(etas=ETAS[name]), beta=0.1),
            base=describe_base(backbone, BASE),
            guidance="full",
            guidance_scale=3.0,
            num_inference_steps=4,
        )
        write_adapter(adapter, network_factors(backbone.network, name), backbone.part)
    create_set(root / "set", [root / "a", root / "b"], base_schedule=EtaSchedule(eta=0.7))
    return FusedSampler.from_pretrained(root / "set", rule="product", forwards="separate")


def test_the_product_of_two_policies_with_different_schedules_is_that_by_quadrature(sampler):
    """p* ∝ p_ref^(1-λ) p_a^(λ w_a) p_b^(λ w_b), numerically normalised, its mean and variance by the trapezoid rule."""
    steps: list[Seen] = []
    sampler.sample(
        PROMPTS,
        WEIGHTS,
        strength=STRENGTH,
        generator=generators(0, 1),
        output_type="latent",
        progress=False,
        observe=lambda step, p, *_: steps.append(Seen(step.t, step.s, step.x_t, p.mean, p.variance)),
    )
    assert [round(step.t, 4) for step in steps] == [1.0, 0.9, 0.75, 0.5]  # linspace(1, 1/4), shifted by 3
    denoiser: Denoiser = sampler.denoiser
    conditioning = sampler.backbone.encode(PROMPTS)
    exponents = {"a": STRENGTH * WEIGHTS["a"], "b": STRENGTH * WEIGHTS["b"], None: 1 - STRENGTH}
    for index, step in enumerate(steps[:-1]):  # the last one has no variance
        with torch.no_grad():
            velocities = denoiser.predictions(step.x_t, step.t, conditioning, networks(*exponents))
        log_density, pixels = 0.0, torch.arange(0, step.x_t[0].numel(), 7)
        center = step.mean.flatten(1)[:, pixels].double().numpy()
        spread = step.variance.flatten(1)[:, :1].double().sqrt().numpy()
        x = center[..., None] + spread[..., None] * np.linspace(-12, 12, 4001)
        for (name, exponent), velocity in zip(exponents.items(), velocities, strict=True):
            x_0, e = step.x_t - step.t * velocity, step.x_t + (1 - step.t) * velocity
            ancestral = step.s**2 * (1 - ((1 - step.t) * step.s / ((1 - step.s) * step.t)) ** 2)
            v = ETAS[name][index] ** 2 * ancestral
            m = ((1 - step.s) * x_0 + (step.s**2 - v) ** 0.5 * e).flatten(1)[:, pixels].double().numpy()
            log_density = log_density - exponent * (x - m[..., None]) ** 2 / (2 * v)
        density = np.exp(log_density - log_density.max(-1, keepdims=True))
        mass = np.trapezoid(density, x)
        mean = np.trapezoid(density * x, x) / mass
        variance = np.trapezoid(density * (x - mean[..., None]) ** 2, x) / mass
        np.testing.assert_allclose(center, mean, atol=2e-6 * np.abs(mean).max())
        np.testing.assert_allclose(np.broadcast_to(spread**2, variance.shape), variance, rtol=1e-5)
        assert abs(center - step.x_t.flatten(1)[:, pixels].numpy()).max() > 1e-2
