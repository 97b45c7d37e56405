"""Rollouts: denoise with the current policy, and store for every step what the loss needs of it."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.data.stages import counted
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import standard_normal
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.rules.step import FusionStep
from stepfuse.train.advantages import best_and_worst, weighted_scores
from stepfuse.train.fused_sampling import Fused, Sampling, Weights, fusion_step


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of a batch.

    Attributes:
        index: of the step among the denoising steps of an image, from 0.
        x_t: the latents before the step, as they were stored; log-probabilities are only computed on these tensors.
        t, s: times of the step on the noise path.
        weights: w_i of the objectives for each image, on the CPU: they decide which networks are run.
        negative: e_u of the base; None unless the guided predictions share it.
        reference: the guided prediction of the base; None if no loss needs it.
    """

    index: int
    x_t: Latents
    t: Time
    s: Time
    weights: Weights
    negative: Latents | None
    reference: Latents | None


@dataclass(frozen=True, kw_only=True)
class SampledStep(Step):
    """A step of DDPO: x_s as it was drawn, its log-probability then, and later its advantage."""

    x_s: Latents
    log_prob: Float[Tensor, " batch"]
    advantage: Float[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True)
class PairedStep(Step):
    """A step of DPO: the best and the worst candidate x_s, and whether their rewards differ by more than the margin."""

    chosen: Latents
    rejected: Latents
    kept: Bool[Tensor, " batch"]


D = TypeVar("D", bound=Step)


@dataclass(frozen=True, kw_only=True)
class Trajectory(Generic[D]):
    """The steps of one batch, noisiest first, its final latents, and the embeddings of its prompts."""

    steps: tuple[D, ...]
    latents: Latents
    conditioning: Conditioning


def sample_generator(seed: int, *key: int | str) -> torch.Generator:
    """A generator that depends on the seed and this key only, so that numbers do not depend on how a batch is split."""
    text = "/".join(map(str, (seed, *key))).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest()))


@torch.no_grad()
def rollout(
    sampling: Sampling,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    weights: Weights | None = None,
    *,
    reference: bool = True,
) -> Trajectory[SampledStep]:
    """Denoise with the policy, and store each random step that is trained on with its log-probability.

    Args:
        generators: one per image.
        weights: of the objectives for each image; by default equal ones.
        reference: also predict with the base, as a KL to it needs.
    """
    sampling = replace(sampling, denoiser=sampling.denoiser.for_run())
    x_t = start(sampling, generators)
    plan = sampling.plan(sampling.equal_weights(len(x_t)) if weights is None else weights)
    stored = []
    for index in counted(range(len(sampling.steps)), "denoising steps"):
        step = fusion_step(plan, index, x_t)
        wanted = sampling.trains_on(step)
        fused = sampling.predict(step, conditioning, reference=wanted and reference)
        gaussian = sampling.rule.combine(step, fused.predictions)
        x_s = gaussian.sample(generators)
        if wanted:
            known = stored_step(step, fused)
            stored.append(SampledStep(**vars(known), x_s=x_s, log_prob=gaussian.log_prob(x_s)))
        x_t = x_s
    return Trajectory(steps=tuple(stored), latents=x_t, conditioning=conditioning)


@torch.no_grad()
def branching_rollout(
    sampling: Sampling,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    weights: Weights | None = None,
    *,
    score_latents: Callable[[Latents], "Future[Float[Tensor, ' images objectives']]"],
    candidates: int,
    margin: float,
) -> Trajectory[PairedStep]:
    """Denoise with the policy; at each step draw candidates, store the best and worst, continue from a random one.

    The score of a candidate is the reward of its predicted x_0 (MSDDA; SPO, arXiv:2406.04314); that of several
    objectives is `weighted_scores`. The next step starts from the same prediction, so nothing is computed twice.
    Rewards are waited for after the last step: the choice of the candidate to continue from does not depend on them.

    Args:
        generators: one per image.
        weights: of the objectives for each image; by default equal ones.
        score_latents: clean latents → their future rewards; the candidates of one image are consecutive.
        candidates: number of candidates per image and step.
        margin: a pair is kept if its scores differ by more than this.
    """
    path, rule = sampling.denoiser.path, sampling.rule
    sampling = replace(sampling, denoiser=sampling.denoiser.for_run())
    x_t = start(sampling, generators)
    plan = sampling.plan(sampling.equal_weights(len(x_t)) if weights is None else weights)
    wide, wide_plan = conditioning.repeat(candidates), plan[torch.arange(len(x_t)).repeat_interleave(candidates)]
    rows = torch.arange(len(x_t), device=x_t.device)
    pending: list[tuple[Step, Tensor, Future[Tensor]]] = []
    now: Fused | None = None
    for index in counted(range(len(sampling.steps)), "denoising steps"):
        step = fusion_step(plan, index, x_t)
        now = now or sampling.predict(step, conditioning)
        gaussian = rule.combine(step, now.predictions)
        if not sampling.trains_on(step):
            x_t, now = gaussian.sample(generators), None
            continue
        drawn = torch.stack([gaussian.sample(generators) for _ in range(candidates)], dim=1)
        clean, ahead = drawn.flatten(0, 1), None
        if index + 1 < len(sampling.steps):
            following = fusion_step(wide_plan, index + 1, clean)
            ahead = sampling.predict(following, wide)
            clean, _ = path.clean_and_noise(clean, rule.average(following, ahead.predictions), following.t)
        rewards = score_latents(clean)
        pending.append((stored_step(step, sampling.with_reference(step, conditioning, now)), drawn, rewards))
        picks = to_device(torch.stack([torch.randint(candidates, (), generator=g) for g in generators]), x_t.device)
        x_t = drawn[rows, picks]
        now = ahead and ahead[rows * candidates + picks]
    stored = []
    for known, drawn, rewards in pending:
        scores = weighted_scores(rewards.result().unflatten(0, drawn.shape[:2]), known.weights)
        winner, loser, kept = best_and_worst(scores, margin)
        chosen, rejected = drawn[rows, winner], drawn[rows, loser]
        stored.append(PairedStep(**vars(known), chosen=chosen, rejected=rejected, kept=kept))
    return Trajectory(steps=tuple(stored), latents=x_t, conditioning=conditioning)


def out_of_inference(trajectory: Trajectory[D]) -> Trajectory[D]:
    """The same trajectory with tensors that autograd accepts; tensors that are shared stay shared."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_inference():
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    steps = tuple(
        replace(step, **{name: copy(value) for name, value in vars(step).items()}) for step in trajectory.steps
    )
    return replace(trajectory, steps=steps, latents=copy(trajectory.latents))


def start(sampling: Sampling, generators: list[torch.Generator]) -> Latents:
    """x_T, drawn with one generator per image."""
    device = next(sampling.denoiser.network.parameters()).device
    shape = (len(generators), *sampling.shape)
    return standard_normal(shape, generators, device=device, dtype=torch.float32)


def stored_step(step: FusionStep, fused: Fused) -> Step:
    """What every loss needs of a step that was predicted."""
    return Step(
        index=step.step_index,
        x_t=step.x_t,
        t=step.t,
        s=step.s,
        weights=step.plan.weights[step.step_index].T,
        negative=_own(fused.negative),
        reference=_own(fused.reference),
    )


def _own(prediction: Latents | None) -> Latents | None:
    """A copy of what is stored, for a prediction is a part of a forward's output and would keep all of it."""
    with torch.inference_mode(False):  # so that it can be used in a loss
        return None if prediction is None else prediction.clone()
