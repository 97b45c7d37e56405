"""Three adapters of one tiny base, with etas, ranks and betas of their own, for tests of the sampler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import BETAS, LATENT, generators, save_adapter

PROMPTS = ["a red apple on a blue background", "a fox on a green background"]
SCALE = 3.0  # of the guidance
ETAS = {"a": 0.3, "b": 0.7, "c": 1.0}
BETA = {"a": 0.1, "b": 0.2, "c": 0.4}
RANKS = {"a": 1, "b": 2, "c": 4}
REFERENCE = 0.6
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
# ᾱ of Stable Diffusion's scheduler.
ALPHA_BAR = np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)


def save_three_adapters(root: Path, base: Path) -> dict[str, Path]:
    """A folder an adapter."""
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


def save_set(output: Path, folders: dict[str, Path]) -> Path:
    create_set(output, list(folders.values()), base_schedule=EtaSchedule(eta=REFERENCE))
    return output


@contextmanager
def counted_forwards(sampler: FusedSampler) -> Iterator[Callable[[], int]]:
    """Call what it yields for the number of forwards so far."""
    calls: list[int] = []
    hook = sampler.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    yield lambda: len(calls)
    hook.remove()


def changed(sampler, *, reference=None, guidance=None, path=None, **schedules):
    """A sampler of the same models with other schedules, guidance or path."""
    denoiser = replace(sampler.denoiser, path=path or sampler.denoiser.path)
    if guidance is not None:
        denoiser = replace(denoiser, guidance=replace(denoiser.guidance, source=guidance))
    return replace(
        sampler,
        objectives=tuple(replace(o, variance=schedules.get(o.name, o.variance)) for o in sampler.objectives),
        reference=reference or sampler.reference,
        denoiser=denoiser,
    )


def latents(sampler, prompts, weights=None, *, seeds=None, **options):
    seeds = range(len(prompts)) if seeds is None else seeds
    return sampler.sample(
        prompts, weights, generator=generators(*seeds), output_type="latent", progress=False, **options
    )


def noise(seed, batch=2):
    return torch.randn((batch, *LATENT), generator=torch.Generator().manual_seed(seed))


def assert_near(got, expected, tolerance=1e-5):
    """Within `tolerance` of the largest value: latents of a random UNet are not of unit size."""
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1, float(expected.abs().max())))
