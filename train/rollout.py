"""Rollouts: denoise with the current policy, and keep what a loss will need of every step."""

import hashlib
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Branch, Denoiser, Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import VarianceSchedule, step_variance
from stepfuse.train.credit import best_and_worst

Steps = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of a batch.

    Attributes:
        x_t: where it starts, as stored; log-probs are only ever taken on these tensors.
        t, s: its positions on the path.
        negative: e_u of the base, None where guidance does not share it.
        reference: the guided prediction of the base, None where no loss asks for it.
    """

    x_t: Latents
    t: int
    s: int
    negative: Latents | None
    reference: Latents | None


@dataclass(frozen=True, kw_only=True)
class SampledStep(Step):
    """A step of DDPO: x_s as drawn, its log-prob then, and later its advantage."""

    x_s: Latents
    log_prob: Float[Tensor, " batch"]
    advantage: Float[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True)
class PairedStep(Step):
    """A step of DPO: the best and the worst candidate x_s, and whether they differ enough to learn from."""

    chosen: Latents
    rejected: Latents
    kept: Bool[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class NoisedPairs:
    """Images of a data set at one noise level each, the winners of all pairs before their losers.

    Attributes:
        x_t: noised.
        times: t of each.
        target: what a network that knew the image would predict.
        reference: what the base predicts.
    """

    x_t: Latents
    times: Int[Tensor, " batch"]
    target: Latents
    reference: Latents


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The steps of one batch, noisiest first, its final latents, and the prompts' embeddings."""

    steps: tuple[Step | NoisedPairs, ...]
    latents: Latents
    conditioning: Conditioning


@dataclass(frozen=True, kw_only=True)
class _Predictions:
    """At one (x, t): e_u of the base if shared, and the guided predictions of policy and base."""

    negative: Latents | None
    policy: Latents
    reference: Latents | None = None

    def __getitem__(self, rows: Tensor) -> "_Predictions":
        negative = None if self.negative is None else self.negative[rows]
        return _Predictions(negative=negative, policy=self.policy[rows])


def sample_generator(seed: int, *place: int | str) -> torch.Generator:
    """A generator for one sample at one place of the run, the same however the batch is split."""
    key = "/".join(map(str, (seed, *place))).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    adapter: str | None,
    schedule: VarianceSchedule,
    steps: Steps,
    conditioning: Conditioning,
    shape: tuple[int, int, int],
    generators: list[torch.Generator],
    *,
    learned: Container[int] | None = None,
    reference: bool = True,
) -> Trajectory:
    """Denoise with the policy and store every random step with its log-prob.

    Args:
        adapter: name of the policy's LoRA; None denoises with the base model.
        learned: places of the steps to store; by default all.
        reference: predict with the base too, as a KL to it needs.
    """
    x_t = _start(denoiser, shape, generators)
    stored: list[Step] = []
    for number, (t, s) in enumerate(steps):
        # the last step of some schedulers is deterministic
        random = bool((step_variance(schedule, denoiser.path, t, s, x_t) > 0).all())
        wanted = random and (learned is None or number in learned)
        now = _predict(denoiser, adapter, x_t, t, conditioning, reference=wanted and reference)
        gaussian = _gaussian(denoiser, schedule, x_t, now.policy, t, s)
        x_s = gaussian.sample(generators)
        if wanted:
            stored.append(
                SampledStep(
                    x_t=x_t,
                    t=t,
                    s=s,
                    negative=now.negative,
                    reference=now.reference,
                    x_s=x_s,
                    log_prob=gaussian.log_prob(x_s),
                )
            )
        x_t = x_s
    return Trajectory(steps=tuple(stored), latents=x_t, conditioning=conditioning)


@torch.no_grad()
def branching_rollout(
    denoiser: Denoiser,
    adapter: str | None,
    schedule: VarianceSchedule,
    steps: Steps,
    conditioning: Conditioning,
    shape: tuple[int, int, int],
    generators: list[torch.Generator],
    *,
    score_latents: Callable[[Latents], "Future[Float[Tensor, ' images']]"],
    candidates: int,
    margin: float,
    learned: Container[int] | None = None,
) -> Trajectory:
    """Denoise with the policy; at each step draw k candidates, keep the best and worst, go on from a random one.

    A candidate's score is the reward of its predicted x_0 (MSDDA; SPO, arXiv:2406.04314). Its
    prediction is the one the next step starts from, so nothing is computed twice. Rewards are waited for when all is
    drawn: which candidate it goes on from does not depend on them.

    Args:
        score_latents: clean latents (b·k) → rewards to be, sample-major: the candidates of one sample lie together.
        learned: places of the steps with candidates; by default all.
    """
    x_t = _start(denoiser, shape, generators)
    now = _predict(denoiser, adapter, x_t, steps[0][0], conditioning)
    wide = conditioning.repeat(candidates)
    rows = torch.arange(len(x_t), device=x_t.device)
    asked: list[tuple[Step, Latents, Future[Tensor]]] = []
    for number, (t, s) in enumerate(steps):
        following = steps[number + 1][0] if number + 1 < len(steps) else None
        gaussian = _gaussian(denoiser, schedule, x_t, now.policy, t, s)
        branches = learned is None or number in learned
        if not branches or not bool((gaussian.variance > 0).all()):
            x_t = gaussian.sample(generators)
            if following is not None:
                now = _predict(denoiser, adapter, x_t, following, conditioning)
            continue
        drawn = torch.stack([gaussian.sample(generators) for _ in range(candidates)], dim=1)
        flat = drawn.flatten(0, 1)
        if following is None:
            clean, ahead = flat, None
        else:
            ahead = _predict(denoiser, adapter, flat, following, wide)
            clean, _ = denoiser.path.clean_and_noise(flat, ahead.policy, following)
        rewards = score_latents(clean)
        reference = _reference(denoiser, x_t, t, conditioning, now.negative)
        asked.append((Step(x_t=x_t, t=t, s=s, negative=now.negative, reference=reference), drawn, rewards))
        picks = torch.stack([torch.randint(candidates, (), generator=g) for g in generators]).to(x_t.device)
        x_t = drawn[rows, picks]
        if ahead is not None:
            now = ahead[rows * candidates + picks]
    stored = tuple(_paired(step, drawn, rewards.result(), margin) for step, drawn, rewards in asked)
    return Trajectory(steps=stored, latents=x_t, conditioning=conditioning)


def _paired(
    step: Step, drawn: Float[Tensor, "batch candidates channels height width"], rewards: Tensor, margin: float
) -> PairedStep:
    winner, loser, kept = best_and_worst(rewards.reshape(drawn.shape[:2]), margin)
    rows = torch.arange(len(drawn), device=drawn.device)
    own = {field.name: getattr(step, field.name) for field in fields(step)}
    return PairedStep(**own, chosen=drawn[rows, winner], rejected=drawn[rows, loser], kept=kept)


def out_of_inference(trajectory: Trajectory) -> Trajectory:
    """The same with tensors that autograd takes; those that are one stay one."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_inference():
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    steps = tuple(
        replace(cast(Any, step), **{field.name: copy(getattr(step, field.name)) for field in fields(step)})
        for step in trajectory.steps
    )
    return replace(trajectory, steps=steps, latents=copy(trajectory.latents))


def with_advantages(trajectory: Trajectory, advantages: Float[Tensor, " batch"]) -> Trajectory:
    """Every step of a trajectory gets the advantage of the image it led to."""
    return replace(
        trajectory,
        steps=tuple(replace(step, advantage=advantages) for step in cast(tuple[SampledStep, ...], trajectory.steps)),
    )


def _start(denoiser: Denoiser, shape: tuple[int, int, int], generators: list[torch.Generator]) -> Latents:
    device = next(denoiser.unet.parameters()).device
    return randn_tensor((len(generators), *shape), generator=generators, device=device, dtype=torch.float32)


def _predict(
    denoiser: Denoiser,
    adapter: str | None,
    x_t: Latents,
    t: int,
    conditioning: Conditioning,
    *,
    reference: bool = False,
) -> _Predictions:
    """The guided prediction of the policy; with `reference` the base's too, in one forward with its e_u.

    Where the denoiser is batched, all in one.
    """
    if denoiser.guidance != "shared":
        policy, *base = denoiser.predictions(x_t, t, conditioning, [adapter, None] if reference else [adapter])
        return _Predictions(negative=None, policy=policy, reference=base[0] if base else None)
    wanted = [Branch(None, kind) for kind in ("-+" if reference else "-")]
    negative, *base, positive = denoiser.run(x_t, t, conditioning, [*wanted, Branch(adapter, "+")])
    return _Predictions(
        negative=negative,
        policy=denoiser.guide(negative, positive),
        reference=denoiser.guide(negative, base[0]) if base else None,
    )


def _reference(
    denoiser: Denoiser, x_t: Latents, t: int, conditioning: Conditioning, negative: Latents | None
) -> Latents:
    if negative is None:
        return denoiser.predictions(x_t, t, conditioning, [None])[0]
    return denoiser.guide(negative, denoiser.forward(x_t, t, conditioning, "+", None)[0])


def _gaussian(
    denoiser: Denoiser, schedule: VarianceSchedule, x_t: Latents, prediction: Latents, t: int, s: int
) -> Gaussian:
    return transition(denoiser.path, x_t, prediction, t, s, step_variance(schedule, denoiser.path, t, s, x_t))
