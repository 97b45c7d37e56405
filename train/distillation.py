"""Distillation: the soup is fitted, on its own rollouts, to the Gaussians of the product."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.train.algorithm import Algorithm, Batch, Source, StepGaussians
from stepfuse.train.collect import learned_steps
from stepfuse.train.conditioning import prompt_order
from stepfuse.train.distill_setup import DistillSetup
from stepfuse.train.fused_sampling import Fused, Sampling, Weights, fusion_step
from stepfuse.train.mixtures import group_weights
from stepfuse.train.policy_gaussians import step_gaussians
from stepfuse.train.rollout import Step, Trajectory, out_of_inference, sample_generator, start, stored_step


@dataclass(frozen=True, kw_only=True)
class DistilledStep(Step):
    """A step of distillation: mean and variance of the product of the teachers at x_t."""

    mean: Latents
    variance: Tensor


class Distillation(Algorithm[DistilledStep]):
    """KL( soup of the students ‖ product of the teachers ) of each step, on rollouts of the soup.

        Σ_t KL( p_θ(x_s | x_t) ‖ p*(x_s | x_t) ),     x_t ~ p_θ

    is the KL between the runs, by the chain rule; its gradient here is that of the steps on stored x_t (on-policy
    distillation, arXiv:2306.13649). It has no reward. `kl` is measured as in other trainings, from the product in place
    of the base.
    """

    name: ClassVar[str] = "distill"

    def source(self, setup: DistillSetup) -> Source[DistilledStep]:
        """Where its micro-batches come from."""
        return partial(collect_steps, setup)

    def gaussians(
        self, policy: nn.Module, sampling: Sampling, steps: Sequence[DistilledStep], conditioning: Conditioning
    ) -> Sequence[StepGaussians]:
        """The soup, with gradients, and the product."""
        students = step_gaussians(policy, sampling, steps, conditioning)
        return [
            (soup, Gaussian(mean=step.mean, variance=step.variance))
            for (soup, _), step in zip(students, steps, strict=True)
        ]

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: DistilledStep) -> Float[Tensor, " batch"]:
        assert reference is not None  # the product
        return policy.kl(reference)

    def weights(self, step: DistilledStep) -> Weights:
        return step.weights

    def step_index(self, step: DistilledStep) -> int:
        return step.index


def collect_steps(setup: DistillSetup, step: int) -> tuple[list[Batch[DistilledStep]], dict[str, float]]:
    """This process's micro-batches of an optimiser step: each image has a prompt and weights of its own."""
    settings, count = setup.settings, setup.total_batch_size
    order = prompt_order(settings.seed, len(setup.prompts), step, count)
    mixtures = group_weights(settings, step, count)
    students = setup.current_sampling(learned=learned_steps(settings, setup.learnable, step))
    batches = []
    for indices in setup.micro_batches():
        prompts = [setup.prompts[order[i]] for i in indices]
        generators = [sample_generator(settings.seed, "rollout", step, i) for i in indices]
        conditioning, weights = setup.embed(prompts), mixtures[indices.start : indices.stop]
        with setup.accelerator.autocast(), torch.inference_mode(not setup.engine.partitioned):
            trajectory = distilled_rollout(students, setup.teachers, conditioning, generators, weights)
        steps = out_of_inference(trajectory).steps
        batches.append(Batch(prompts=prompts, steps=steps, conditioning=conditioning))
    return batches, {}


@torch.no_grad()
def distilled_rollout(
    students: Sampling,
    teachers: Sampling,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    weights: Weights,
) -> Trajectory[DistilledStep]:
    """Denoise with the soup, and store each step that is trained on with the product's Gaussian there.

    Args:
        generators: one per image.
        weights: of the objectives for each image.
    """
    x_t, plan, taught = start(students, generators), students.plan(weights), teachers.plan(weights)
    stored = []
    for index in range(len(students.steps)):
        step = fusion_step(plan, index, x_t)
        fused = students.predict(step, conditioning)
        if students.trains_on(step):
            product = product_at(teachers, replace(step, plan=taught), conditioning, fused)
            known = vars(stored_step(step, fused))
            stored.append(DistilledStep(**known, mean=product.mean, variance=product.variance))
        x_t = students.rule.combine(step, fused.predictions).sample(generators)
    return Trajectory(steps=tuple(stored), latents=x_t, conditioning=conditioning)


def product_at(teachers: Sampling, step: FusionStep, conditioning: Conditioning, fused: Fused) -> Gaussian:
    """p* of the teachers at a step of their plan.

    Args:
        fused: predictions of the students there, whose e_u of the base is not computed again.
    """
    taught = teachers.predict(step, conditioning, negative=fused.negative)
    return teachers.rule.combine(step, taught.predictions)
