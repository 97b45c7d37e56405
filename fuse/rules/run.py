"""A whole run of denoising: one rule, step by step, or in blocks of candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian, Generators
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.best_of_n import CoDe
from stepfuse.fuse.rules.plan import FusionStep, Latents, Networks, Plan, Rows, Score

Observer = Callable[[FusionStep, Gaussian], None]
After = Callable[[int, Time, Latents], tuple[Latents, bool]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every step of a run has in common.

    Attributes:
        rule: how steps are fused; its `prepare` has seen the plan.
        plan: the run, for as many images as are denoised together.
        networks: predictions of the plan's experts.
        rewards: a reward of x_0 latents an objective, for rules that need them.
        scales: σ_i of those rewards.
        observe: called with every step and its Gaussian before it is sampled, in whatever order images have there.
        after: called with every step's number, its t and its sample; gives the sample to go on with, and whether to.
            Not with candidates, which are no images yet.
    """

    rule: FusionRule
    plan: Plan
    networks: Networks
    rewards: Sequence[Score] = ()
    scales: Sequence[float] = ()
    observe: Observer | None = None
    after: After | None = None

    def denoise(self, x: Latents, generators: list[torch.Generator]) -> Latents:
        """From x_T to x_0; an image depends on its own generator alone."""
        uniforms = uniform_numbers(self.plan, generators)
        if isinstance(self.rule, CoDe) and self.rule.candidates > 1:
            return self._best_of_blocks(self.rule, x, uniforms, generators)
        memory: dict[str, Any] = {}
        for number in range(len(self.plan.steps)):
            step = replace(self._step(number, x, uniforms, None), memory=memory)
            gaussian = self.rule(step)
            if self.observe:
                self.observe(step, gaussian)
            x = gaussian.sample(generators)
            if self.after:
                x, more = self.after(number, step.t, x)
                if not more:
                    break
        return x

    def _step(self, number: int, x: Latents, uniforms: Tensor, rows: Rows | None) -> FusionStep:
        plan = self.plan if rows is None else self.plan[rows]
        return FusionStep(
            plan=plan,
            number=number,
            x_t=x,
            networks=self.networks,
            uniforms=uniforms if rows is None else uniforms[rows],
            rewards=self.rewards,
            rows=rows,
        )

    def _best_of_blocks(self, rule: CoDe, x: Latents, uniforms: Tensor, generators: list[torch.Generator]) -> Latents:
        """CoDe: candidates branch at the first step of a block; the best at its end goes on.

        The candidates of a block share its first prediction, and the look-ahead at its end is the first prediction of
        the next.
        """
        count, steps, batch = rule.candidates, len(self.plan.steps), len(x)
        rows = torch.arange(batch).repeat_interleave(count)
        own = [g for first in generators for g in (first, *_candidate_generators(first, count - 1))]
        base = self.plan.base
        step = self._step(0, x, uniforms, None)
        (prediction,) = step.predict([base])
        for number in range(steps):
            if number % rule.block_size == 0:  # one latent an image, its prediction known
                step = self._step(number, x.repeat_interleave(count, 0), uniforms, rows)
                prediction = prediction.repeat_interleave(count, 0)
            else:
                step = self._step(number, x, uniforms, rows)
                (prediction,) = step.predict([base])
            gaussian = step.transition(prediction, step.variance(base))
            if self.observe:
                self.observe(step, gaussian)
            x = gaussian.sample(own)
            if number + 1 == steps:
                x = x[self._best(number, x, rows, count)]
            elif (number + 1) % rule.block_size == 0:
                ahead = self._step(number + 1, x, uniforms, rows)
                (prediction,) = ahead.predict([base])
                clean, _ = self.plan.path.clean_and_noise(x, prediction, ahead.t)
                best = self._best(number, clean, rows, count)
                x, prediction = x[best], prediction[best]
        return x

    def _best(self, number: int, clean: Latents, rows: Rows, count: int) -> Tensor:
        """The row of each image's candidate with the largest Σ w_i r_i / σ_i."""
        total = weighted_reward(self.rewards, self.scales, self.plan.weights[number][:, rows], clean, rows)
        best = total.reshape(-1, count).argmax(1).cpu()
        return (best + torch.arange(len(best)) * count).to(clean.device)


def weighted_reward(
    rewards: Sequence[Score],
    scales: Sequence[float],
    weights: Float[Tensor, "experts rows"],
    clean: Latents,
    rows: Rows,
) -> Float[Tensor, " rows"]:
    """Σ w_i r_i(x_0) / σ_i; a reward whose weight is 0 for all rows is not computed."""
    total = torch.zeros(len(clean), dtype=torch.float64)
    for reward, scale, w in zip(rewards, scales, weights[: len(rewards)], strict=True):
        if bool((w != 0).any()):
            total += w * reward(clean, rows).detach().cpu().double() / scale
    return total


def uniform_numbers(plan: Plan, generators: Sequence[torch.Generator]) -> Float[Tensor, "batch draws"]:
    """Each image's own numbers in [0, 1): enough for one a step, and one an expert."""
    draws = max(len(plan.steps), len(plan.schedules))
    own = [private_generator(g) for g in generators]
    return torch.stack([torch.rand(draws, generator=g, dtype=torch.float64, device=g.device).cpu() for g in own])


def private_generator(generator: torch.Generator, *place: int) -> torch.Generator:
    """A generator of its own for an image's other random choices; the image's own is left as it is.

    So rules that draw lots see the same x_T and the same noise as those that do not.
    """
    copy = torch.Generator(device=generator.device)
    copy.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (1,), generator=copy, device=generator.device).item())
    for number in (1, *place):
        seed = (seed * 6364136223846793005 + 1442695040888963407 + number) % 2**63  # Knuth's MMIX
    return torch.Generator(device=generator.device).manual_seed(seed)


def _candidate_generators(generator: torch.Generator, count: int) -> list[torch.Generator]:
    return [private_generator(generator, 1 + i) for i in range(count)]


def image_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One generator an image: those given, or ones seeded by a single one.

    A single generator of a single image is taken itself, so that the image is that of diffusers.

    Raises:
        ValueError: for a list of another length.
    """
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; expected 1 or {count}")
        return generator
    if generator is not None and count == 1:
        return [generator]
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device if generator else "cpu")
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
