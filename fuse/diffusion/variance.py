"""Variance schedules: how random each objective's denoising steps are.

A schedule gives r, the variance of a step relative to the ancestral one (`NoisePath.ancestral_variance`):
v = r · ancestral. Its limit where variances vanish is then well defined, and one schedule serves
every number of steps.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import at_least_float32
from stepfuse.fuse.diffusion.noise_path import NoisePath


class VarianceSchedule(Protocol):
    """One method: the relative variance r of the step from t to s, broadcastable against `like`."""

    def relative(self, path: NoisePath, t: Tensor | int, s: Tensor | int, like: Tensor) -> Tensor: ...


def step_variance(
    schedule: VarianceSchedule, path: NoisePath, t: Tensor | int, s: Tensor | int, like: Tensor
) -> Tensor:
    """v = r · ancestral variance, in squared latent units, broadcastable against `like`."""
    return schedule.relative(path, t, s, like) * path.ancestral_variance(t, s, like)


@dataclass(frozen=True, kw_only=True)
class EtaSchedule:
    """r = eta² (DDIM, arXiv:2010.02502, eq. 16): 0 is deterministic, 1 ancestral sampling.

    Raises:
        ValueError: for eta outside [0, 1].
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def relative(self, path: NoisePath, t: Tensor | int, s: Tensor | int, like: Tensor) -> Tensor:
        return _constant(self.eta**2, like)


@dataclass(frozen=True, kw_only=True)
class TableSchedule:
    """r = eta_k², one eta a step of equal share of the time, the noisiest first.

    With as many sampling steps as entries, each step has its own; with another number, a step
    takes the entry of the table's own step that it starts in.

    Raises:
        ValueError: for an empty table or an eta outside [0, 1].
    """

    etas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "etas", tuple(self.etas))
        if not self.etas:
            raise ValueError("an empty variance table; give one eta a step")
        for eta in self.etas:
            _check_eta(eta)

    def relative(self, path: NoisePath, t: Tensor | int, s: Tensor | int, like: Tensor) -> Tensor:
        position = torch.as_tensor(t, device="cpu").reshape(-1)
        starts = torch.tensor([start for start, _ in path.steps(len(self.etas))])
        row = (starts[None] >= position[:, None]).sum(1) - 1
        etas = torch.tensor(self.etas, dtype=torch.float64)[row.clamp(0, len(self.etas) - 1)]
        return etas.square().reshape(-1, *[1] * (like.ndim - 1)).to(like.device, at_least_float32(like).dtype)


@dataclass(frozen=True, kw_only=True)
class LearnedSchedule:
    """Log-variance offsets at knots over the time, trained with the LoRA.

        v = sigma_s² E p / (1 - p + E p),   E = exp(offset(t)),   p = eta² · ancestral / sigma_s²

    For v far below sigma_s² this is v = exp(offset) · eta² · ancestral; the logistic form keeps v under
    sigma_s², beyond which no transition exists. Offsets are linear between knots, which are evenly
    spaced over [0, 1] of the training time.

    Raises:
        ValueError: for fewer than two knots, offsets that are not finite, or eta outside (0, 1].
    """

    offsets: Float[Tensor, " knots"]
    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        offsets = torch.as_tensor(self.offsets, dtype=torch.float32)
        object.__setattr__(self, "offsets", offsets)
        if offsets.ndim != 1 or len(offsets) < 2:
            raise ValueError(f"learned schedule with offsets of shape {tuple(offsets.shape)}; expected 2 knots or more")
        if not bool(torch.isfinite(offsets.detach()).all()):
            raise ValueError(f"learned schedule with offsets {offsets.tolist()}; expected finite numbers")
        if self.eta == 0:
            raise ValueError("learned schedule on eta 0: there is no variance to scale; use an eta above 0")

    def relative(self, path: NoisePath, t: Tensor | int, s: Tensor | int, like: Tensor) -> Tensor:
        dtype, like = at_least_float32(like).dtype, like.double()  # 1 - (...)² cancels in short steps
        place = torch.as_tensor(t, device="cpu").reshape(-1).double() / (path.length - 1)
        place = (place.clamp(0, 1) * (len(self.offsets) - 1)).to(like)
        low = place.floor().clamp(max=len(self.offsets) - 2).long()
        fraction = place - low
        offsets = self.offsets.to(like)
        offset = offsets[low] * (1 - fraction) + offsets[low + 1] * fraction
        growth = offset.exp().reshape(-1, *[1] * (like.ndim - 1))
        alpha_t, sigma_t = path.at(t, like)
        alpha_s, sigma_s = path.at(s, like)
        ancestral_share = 1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2  # ancestral / sigma_s²
        p = self.eta**2 * ancestral_share
        return (growth * self.eta**2 / (1 - p + growth * p)).to(dtype)


def _check_eta(eta: float) -> None:
    if not isinstance(eta, int | float) or math.isnan(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; expected a number in [0, 1]")


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.full((1,) * like.ndim, value, dtype=at_least_float32(like).dtype, device=like.device)
