"""What every step of one run shares, and the random numbers of its images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian, Generators, Latents
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.lora.mixture import Rows
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.step import FusionStep, PredictFn, Score

StepObserver = Callable[[FusionStep, Gaussian], None]
AfterStep = Callable[[int, Time, Latents], tuple[Latents, bool]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run offers to the rule that denoises it, once.

    Attributes:
        plan: For as many images as are denoised together; the rule's `prepare` has seen it.
        rewards: A reward of x_0 latents for each objective, for rules that need them.
        scales: σ_i of those rewards.
        observe: Called with every step and its Gaussian before it is sampled, in whatever order images have there.
        after: Called with the index of every step, its t and its sample; returns the sample to continue with, and
            whether to continue. Only for rules that denoise one latent an image.
        memory: What the rule keeps from step to step.
    """

    plan: Plan
    predict_fn: PredictFn
    rewards: Sequence[Score] = ()
    scales: Sequence[float] = ()
    observe: StepObserver | None = None
    after: AfterStep | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def step(
        self, step_index: int, x_t: Latents, uniforms: Float[Tensor, "images draws"], *, images: Rows | None = None
    ) -> FusionStep:
        """A step of the run, for all images or for one latent of each of `images`."""
        return FusionStep(
            plan=self.plan if images is None else self.plan[images],
            step_index=step_index,
            x_t=x_t,
            predict_fn=self.predict_fn,
            uniforms=uniforms if images is None else uniforms[images],
            rewards=self.rewards,
            images=torch.arange(len(x_t)) if images is None else images,
            memory=self.memory,
        )

    def sample(self, step: FusionStep, gaussian: Gaussian, generators: list[torch.Generator]) -> Latents:
        """x_s of a step, which is observed first."""
        if self.observe:
            self.observe(step, gaussian)
        return gaussian.sample(generators)


def uniform_numbers(plan: Plan, generators: Sequence[torch.Generator]) -> Float[Tensor, "batch draws"]:
    """Random numbers in [0, 1) of each image: enough for one a step, and one an expert."""
    draws = max(len(plan.steps), len(plan.experts))
    private = [private_generator(generator) for generator in generators]
    return torch.stack([torch.rand(draws, generator=g, dtype=torch.float64, device=g.device).cpu() for g in private])


def private_generator(generator: torch.Generator, *indices: int) -> torch.Generator:
    """A generator for an image's other random choices, by their indices; the image's generator keeps its state.

    So rules that select experts at random see the same x_T and the same noise as those that do not.
    """
    copy = torch.Generator(device=generator.device)
    copy.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (1,), generator=copy, device=generator.device).item())
    for index in (1, *indices):
        seed = (seed * 6364136223846793005 + 1442695040888963407 + index) % 2**63  # Knuth's MMIX
    return torch.Generator(device=generator.device).manual_seed(seed)


def image_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One generator an image: those given, or ones seeded by a single one; a ValueError for another number of them.

    A single generator of a single image is taken itself, so that the image is that of diffusers.
    """
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; expected 1 or {count}")
        return generator
    if generator is not None and count == 1:
        return [generator]
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device if generator else "cpu")
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
