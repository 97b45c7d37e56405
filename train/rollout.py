"""Rollouts: denoise with the current policy, and store for every step what the loss needs of it."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Bool, Float
from torch import Tensor

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser, Guided
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import VarianceSchedule, step_variance
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.train.advantages import best_and_worst


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled during training.

    Attributes:
        denoiser: the network and its guidance.
        adapter: name of the policy's LoRA; None samples with the base model.
        schedule: variance schedule of the denoising steps.
        steps: pairs (t, s) of the noise path, noisiest first.
        shape: shape of one latent.
        learned: indices of the steps to train on; None is all of them.
    """

    denoiser: Denoiser
    adapter: str | None
    schedule: VarianceSchedule
    steps: list[tuple[Time, Time]]
    shape: tuple[int, int, int]
    learned: frozenset[int] | None = None

    def variance(self, t: Time, s: Time, like: Tensor) -> Tensor:
        return step_variance(self.schedule, self.denoiser.path, t, s, like)

    def trains_on(self, index: int, variance: Tensor) -> bool:
        """Whether a step of this variance is trained on: one without is not, as the last of some schedulers."""
        return (self.learned is None or index in self.learned) and bool((variance > 0).all())


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of a batch.

    Attributes:
        index: of the step among the denoising steps of an image, from 0.
        x_t: the latents before the step, as they were stored; log-probabilities are only computed on these tensors.
        t, s: times of the step on the noise path.
        negative: e_u of the base; None unless the guided predictions share it.
        reference: the guided prediction of the base; None if no loss needs it.
    """

    index: int
    x_t: Latents
    t: Time
    s: Time
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
    sampling: Sampling, conditioning: Conditioning, generators: list[torch.Generator], *, reference: bool = True
) -> Trajectory[SampledStep]:
    """Denoise with the policy, and store each random step that is trained on with its log-probability.

    Args:
        generators: one per image.
        reference: also predict with the base, as a KL to it needs.
    """
    denoiser, policy = sampling.denoiser, Network.of(sampling.adapter)
    x_t = _start(sampling, generators)
    stored = []
    for index, (t, s) in enumerate(sampling.steps):
        variance = sampling.variance(t, s, x_t)
        wanted = sampling.trains_on(index, variance)
        guided = denoiser.guided(x_t, t, conditioning, [policy, BASE] if wanted and reference else [policy])
        prediction, *base = guided.predictions
        gaussian = transition(denoiser.path, x_t, prediction, t, s, variance)
        x_s = gaussian.sample(generators)
        if wanted:
            known = base[0] if base else None
            step = Step(index=index, x_t=x_t, t=t, s=s, negative=guided.negative, reference=known)
            stored.append(SampledStep(**vars(step), x_s=x_s, log_prob=gaussian.log_prob(x_s)))
        x_t = x_s
    return Trajectory(steps=tuple(stored), latents=x_t, conditioning=conditioning)


@torch.no_grad()
def branching_rollout(
    sampling: Sampling,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    *,
    score_latents: Callable[[Latents], "Future[Float[Tensor, ' images']]"],
    candidates: int,
    margin: float,
) -> Trajectory[PairedStep]:
    """Denoise with the policy; at each step draw candidates, store the best and worst, continue from a random one.

    The score of a candidate is the reward of its predicted x_0 (MSDDA; SPO, arXiv:2406.04314). The next step starts
    from the same prediction, so nothing is computed twice. Rewards are waited for after the last step: the choice of
    the candidate to continue from does not depend on them.

    Args:
        generators: one per image.
        score_latents: clean latents → their future rewards; the candidates of one image are consecutive.
        candidates: number of candidates per image and step.
        margin: a pair is kept if its rewards differ by more than this.
    """
    denoiser, policy = sampling.denoiser, Network.of(sampling.adapter)
    x_t = _start(sampling, generators)
    wide = conditioning.repeat(candidates)
    rows = torch.arange(len(x_t), device=x_t.device)
    pending: list[tuple[Step, Tensor, Future[Tensor]]] = []
    now: Guided | None = None
    for index, (t, s) in enumerate(sampling.steps):
        now = now or denoiser.guided(x_t, t, conditioning, [policy])
        variance = sampling.variance(t, s, x_t)
        gaussian = transition(denoiser.path, x_t, now.predictions[0], t, s, variance)
        if not sampling.trains_on(index, variance):
            x_t, now = gaussian.sample(generators), None
            continue
        drawn = torch.stack([gaussian.sample(generators) for _ in range(candidates)], dim=1)
        clean, ahead = drawn.flatten(0, 1), None
        if index + 1 < len(sampling.steps):
            following, _ = sampling.steps[index + 1]
            ahead = denoiser.guided(clean, following, wide, [policy])
            clean, _ = denoiser.path.clean_and_noise(clean, ahead.predictions[0], following)
        rewards = score_latents(clean)
        (reference,) = denoiser.guided(x_t, t, conditioning, [BASE], negative=now.negative).predictions
        step = Step(index=index, x_t=x_t, t=t, s=s, negative=now.negative, reference=reference)
        pending.append((step, drawn, rewards))
        picks = torch.stack([torch.randint(candidates, (), generator=g) for g in generators]).to(x_t.device)
        x_t = drawn[rows, picks]
        now = ahead and _rows_of(ahead, rows * candidates + picks)
    stored = []
    for step, drawn, rewards in pending:
        winner, loser, kept = best_and_worst(rewards.result().reshape(drawn.shape[:2]), margin)
        chosen, rejected = drawn[rows, winner], drawn[rows, loser]
        stored.append(PairedStep(**vars(step), chosen=chosen, rejected=rejected, kept=kept))
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


def _start(sampling: Sampling, generators: list[torch.Generator]) -> Latents:
    device = next(sampling.denoiser.network.parameters()).device
    shape = (len(generators), *sampling.shape)
    return randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)


def _rows_of(guided: Guided, rows: Tensor) -> Guided:
    negative = None if guided.negative is None else guided.negative[rows]
    return Guided(predictions=[prediction[rows] for prediction in guided.predictions], negative=negative)
