"""Noise paths x_t = alpha_t x_0 + sigma_t e, and the meaning of a network's prediction on them."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.fuse.diffusion.configuration import check_configuration
from stepfuse.fuse.diffusion.gaussian import Latents, at_least_float32, per_sample
from stepfuse.fuse.diffusion.schedulers import SCHEDULER_EXPECTED, SCHEDULER_HANDLED, DiscretePrediction, as_ddim

Time = int | float | Tensor  # one for all samples, or a tensor of one a sample
FINAL = -1  # the time at the end of the last step of a `TablePath`


class NoisePath(ABC):
    """The coefficients alpha_t and sigma_t by time, and the times of a sampler's steps, which `scheduler` spaces."""

    scheduler: SchedulerMixin
    prediction_type: DiscretePrediction | Literal["flow"]

    @staticmethod
    def from_scheduler(scheduler: SchedulerMixin) -> "NoisePath":
        """The path of a diffusers scheduler: `FlowPath` for flow matching, `TablePath` for DDPM-type schedulers.

        A DDPM-type scheduler that is not DDIM is replaced by the DDIM scheduler on the same path; how it would have
        integrated (`use_karras_sigmas`, `solver_order`, …) is ignored, and its spacing of steps is kept.

        Raises:
            ValueError: for a scheduler of another family, one that clips predictions, a network that predicts noise
                where the path holds nothing else (`rescale_betas_zero_snr`), and options that are not known.
        """
        scheduler = copy.deepcopy(scheduler)  # `steps` sets its time steps
        check_configuration("the scheduler", scheduler, handled=SCHEDULER_HANDLED, expected=SCHEDULER_EXPECTED)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return FlowPath(scheduler=scheduler)
        scheduler = as_ddim(scheduler)
        squares = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.reshape(1)]).double()
        return TablePath(
            alpha=squares.sqrt(),
            sigma=(1 - squares).sqrt(),
            prediction_type=scheduler.config.prediction_type,
            scheduler=scheduler,
        )

    @abstractmethod
    def at(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), shaped to broadcast against `like`, in its precision and at least float32."""

    @abstractmethod
    def share(self, t: Time) -> Float[Tensor, " times"]:
        """Where times lie on the path, in float64 on the CPU: 0 is the least noisy time, 1 the noisiest."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """One random time of shape (1,), as networks are trained at; uniform."""

    @abstractmethod
    def network_time(self, t: Time) -> Tensor:
        """The time that the network is given, as in the scheduler's `timesteps`."""

    @abstractmethod
    def steps(self, count: int) -> list[tuple[Time, Time]]:
        """The (t, s) of a sampler with `count` steps, noisiest first; a ValueError for a count that it cannot have."""

    @abstractmethod
    def scheduler_of(self, count: int) -> SchedulerMixin:
        """A copy of the scheduler with the time steps of `steps`, for diffusers' own loops; its errors are the same."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides alpha_t, sigma_t and the steps, and what is predicted, as plain JSON values."""

    def target(self, x_0: Latents, e: Latents, t: Time) -> Latents:
        """The prediction that stands for (x_0, e): the inverse of `clean_and_noise`."""
        alpha, sigma = self.at(t, x_0)
        match self.prediction_type:
            case "epsilon":
                return e
            case "v_prediction":
                return alpha * e - sigma * x_0
            case "sample":
                return x_0
            case "flow":
                return e - x_0

    def clean_and_noise(self, x_t: Latents, prediction: Latents, t: Time) -> tuple[Latents, Latents]:
        """The (x_0, e) that a prediction stands for, with x_t = alpha_t x_0 + sigma_t e.

        The prediction is e of `epsilon`, alpha e - sigma x_0 of `v_prediction` (arXiv:2202.00512), x_0 of `sample`, and
        e - x_0 of `flow` (rectified flow, arXiv:2209.03003), where alpha + sigma = 1.
        """
        x_t, prediction = at_least_float32(x_t), at_least_float32(prediction)
        alpha, sigma = self.at(t, x_t)
        match self.prediction_type:
            case "epsilon":
                return (x_t - sigma * prediction) / alpha, prediction
            case "v_prediction":
                return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
            case "sample":
                return prediction, (x_t - alpha * prediction) / sigma
            case "flow":
                return x_t - sigma * prediction, x_t + alpha * prediction

    def ancestral_variance(self, t: Time, s: Time, like: Tensor) -> Tensor:
        """sigma_s² / sigma_t² (sigma_t² - alpha_t² / alpha_s² sigma_s²): the step variance of DDIM with eta 1.

        On a DDPM-type path this is (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s), the posterior variance (DDIM, eq. 16).
        """
        wide = like.new_zeros([1] * like.ndim, dtype=torch.float64)  # for its device and dimensions
        alpha_t, sigma_t = self.at(t, wide)
        alpha_s, sigma_s = self.at(s, wide)
        variance = sigma_s**2 / sigma_t**2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        return variance.clamp(min=0).to(at_least_float32(like).dtype)  # rounding may leave -1e-19

    def noised(self, x_0: Latents, e: Latents, t: Time) -> Latents:
        """x_t = alpha_t x_0 + sigma_t e."""
        alpha, sigma = self.at(t, x_0)
        return alpha * x_0 + sigma * e

    def _configuration(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.scheduler.config.get(name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TablePath(NoisePath):
    """A DDPM-type path, alpha_t² = `alphas_cumprod` (DDIM, arXiv:2010.02502).

    A time is an index into the scheduler's training table. `FINAL` (-1) is the end of the last step, with the
    scheduler's own final alpha, which comes last in `alpha`.
    """

    alpha: Float[Tensor, " times"]  # float64
    sigma: Float[Tensor, " times"]
    prediction_type: DiscretePrediction
    scheduler: SchedulerMixin
    _copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def length(self) -> int:
        """The number of times, the final one not counted."""
        return len(self.alpha) - 1

    def at(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        key = like.device, at_least_float32(like).dtype
        if key not in self._copies:  # copied once: small copies at every step would keep a GPU waiting
            with torch.inference_mode(False):  # kept longer than the mode they are first asked for in
                self._copies[key] = to_device(self.alpha, *key), to_device(self.sigma, *key)
        index = t if isinstance(t, int) else to_device(torch.as_tensor(t), like.device)
        alpha, sigma = self._copies[key]
        return per_sample(alpha[index], like), per_sample(sigma[index], like)

    def share(self, t: Time) -> Float[Tensor, " times"]:
        return (torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1) / (self.length - 1)).clamp(0, 1)

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.length, (1,), generator=generator)

    def network_time(self, t: Time) -> Tensor:
        return torch.as_tensor(t)

    def steps(self, count: int) -> list[tuple[Time, Time]]:
        """As DDIM spaces them; s is FINAL where it lies before the table."""
        scheduler, stride = self.scheduler_of(count), self.length // count
        # DDIM steps from t to t - stride, whatever comes next in the list of times.
        return [(t, max(t - stride, FINAL)) for t in scheduler.timesteps.tolist()]

    def scheduler_of(self, count: int) -> SchedulerMixin:
        if not 1 <= count <= self.length:
            raise ValueError(f"{count} sampling steps; expected 1 to {self.length}")
        scheduler = copy.copy(self.scheduler)  # several threads may ask for steps
        scheduler.set_timesteps(count)
        first = int(scheduler.timesteps.max())
        if first >= self.length:
            raise ValueError(f"{count} sampling steps start at time {first}; expected {self.length - 1} at most")
        return scheduler

    def describe(self) -> dict[str, Any]:
        names = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr"]
        values = self._configuration([*names, "set_alpha_to_one"])
        table = torch.cat([self.alpha, self.sigma]).to(torch.float32).numpy().tobytes()
        betas = self.scheduler.config.get("trained_betas")
        trained = {"alpha_sigma_sha256": hashlib.sha256(table).hexdigest()} if betas else {}
        return {"family": "variance_preserving", "prediction_type": self.prediction_type} | values | trained


@dataclass(frozen=True, kw_only=True)
class FlowPath(NoisePath):
    """Flow matching: x_t = (1 - t) x_0 + t e, and the prediction is e - x_0.

    A time is sigma itself, a number in (0, 1]; 0.0 is the end of the last step. The steps are linspace(1, 1/N), shifted
    as the scheduler says, for any N. The scheduler's default grid ends on a sigma near 0, and a step from there to 0
    dominates every ratio of densities and every KL.

    Attributes:
        mu: the shift of a scheduler whose shift depends on the size of images (`use_dynamic_shifting`), or a function
            of the number of steps that gives it; the backbone knows it (`Backbone.bind`).
    """

    scheduler: SchedulerMixin
    mu: float | Callable[[int], float] | None = None
    prediction_type: Literal["flow"] = "flow"

    def at(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = at_least_float32(like).dtype
        if isinstance(t, Tensor):
            sigma = per_sample(to_device(t, like.device, torch.float64), like)
            return (1 - sigma).to(dtype), sigma.to(dtype)
        # filled in on the device: a copy from the host at every step would keep a GPU waiting
        shape = [1] * like.ndim
        return like.new_full(shape, 1.0 - t, dtype=dtype), like.new_full(shape, float(t), dtype=dtype)

    def share(self, t: Time) -> Float[Tensor, " times"]:
        return torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1).clamp(0, 1)

    def draw(self, generator: torch.Generator) -> Tensor:
        return 1 - torch.rand(1, generator=generator)

    def network_time(self, t: Time) -> Tensor:
        """num_train_timesteps · sigma, in float32."""
        return torch.as_tensor(t, dtype=torch.float32) * self.scheduler.config.num_train_timesteps

    def steps(self, count: int) -> list[tuple[Time, Time]]:
        """linspace(1, 1/N), shifted by the scheduler; a ValueError too where its shift needs a `mu` that is None."""
        return list(pairwise(self.scheduler_of(count).sigmas.tolist()))

    def scheduler_of(self, count: int) -> SchedulerMixin:
        least = 2 if self.scheduler.config.shift_terminal else 1  # the first sigma is 1, the last shift_terminal
        if count < least:
            raise ValueError(f"{count} sampling steps; expected {least} or more")
        if self.scheduler.config.use_dynamic_shifting and self.mu is None:
            raise ValueError(
                "the scheduler has use_dynamic_shifting True, so its steps depend on the size of images, which this "
                "model family does not take into account; set shift instead"
            )
        sigmas = torch.linspace(1, 1 / count, count, dtype=torch.float64).tolist()
        scheduler = copy.copy(self.scheduler)  # several threads may ask for steps
        scheduler.set_timesteps(sigmas=sigmas, mu=self.mu(count) if callable(self.mu) else self.mu)
        return scheduler

    def describe(self) -> dict[str, Any]:
        """What decides the path and the grid of steps; not `mu`, which follows from the image size."""
        names = ["num_train_timesteps", "shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type"]
        names += ["base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"]
        names += ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
        kind = {"family": "flow", "prediction_type": self.prediction_type, "grid": "linspace(1, 1/N)"}
        return kind | self._configuration(names)
