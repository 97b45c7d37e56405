"""Noise paths x_t = alpha_t x_0 + sigma_t e, and the meaning of a network's prediction on them."""

import copy
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import at_least_float32
from stepfuse.fuse.diffusion.schedulers import as_ddim, check_scheduler

Time = int | float | Tensor  # one for all samples, or a tensor of one a sample
FINAL = -1  # the time at the end of the last step of a `TablePath`
PredictionType = Literal["epsilon", "v_prediction", "sample"]


# What diffusers' DDIMScheduler takes for the schedule of Stable Diffusion.
STABLE_DIFFUSION = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


class NoisePath(ABC):
    """The coefficients alpha_t and sigma_t by time, and the times of a sampler's steps.

    Attributes:
        scheduler: the diffusers scheduler that spaces the steps.
        prediction_type: what the network predicts: `epsilon`, `v_prediction`, `sample` or `flow`.
    """

    scheduler: SchedulerMixin
    prediction_type: str

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
        check_scheduler(scheduler)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return FlowPath(scheduler=scheduler)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no noise path known here; expected a DDPM-type scheduler "
                "(with alphas_cumprod) or FlowMatchEulerDiscreteScheduler"
            )
        return TablePath.from_scheduler(scheduler)

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
        """The (t, s) of a sampler with `count` steps, noisiest first.

        Raises:
            ValueError: for a count that the path does not have.
        """

    @abstractmethod
    def target(
        self, x_0: Float[Tensor, "batch *shape"], e: Float[Tensor, "batch *shape"], t: Time
    ) -> Float[Tensor, "batch *shape"]:
        """The prediction that stands for (x_0, e): the inverse of `clean_and_noise`."""

    @abstractmethod
    def clean_and_noise(
        self, x_t: Float[Tensor, "batch *shape"], prediction: Float[Tensor, "batch *shape"], t: Time
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
        """The (x_0, e) that a prediction stands for, with x_t = alpha_t x_0 + sigma_t e."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides alpha_t, sigma_t and the steps, and what is predicted, as plain JSON values."""

    def ancestral_variance(self, t: Time, s: Time, like: Tensor) -> Tensor:
        """sigma_s² / sigma_t² (sigma_t² - alpha_t² / alpha_s² sigma_s²): the step variance of DDIM with eta 1.

        On a DDPM-type path this is (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s), the posterior variance (DDIM, eq. 16).
        """
        wide = like.new_zeros([1] * like.ndim, dtype=torch.float64)  # for its device and dimensions
        alpha_t, sigma_t = self.at(t, wide)
        alpha_s, sigma_s = self.at(s, wide)
        variance = sigma_s**2 / sigma_t**2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        return variance.clamp(min=0).to(at_least_float32(like).dtype)  # rounding may leave -1e-19

    def noised(
        self, x_0: Float[Tensor, "batch *shape"], e: Float[Tensor, "batch *shape"], t: Time
    ) -> Float[Tensor, "batch *shape"]:
        """x_t = alpha_t x_0 + sigma_t e."""
        alpha, sigma = self.at(t, x_0)
        return alpha * x_0 + sigma * e


@dataclass(frozen=True, kw_only=True)
class TablePath(NoisePath):
    """A DDPM-type path, alpha_t² = `alphas_cumprod` (DDIM, arXiv:2010.02502).

    A time is an index into the scheduler's training table. `FINAL` (-1) is the end of the last step, with the
    scheduler's own final alpha.

    Attributes:
        alpha: alpha_t by time, float64, the final one last (so that index -1 finds it).
        sigma: sigma_t by time, likewise.
    """

    alpha: Float[Tensor, " times"]
    sigma: Float[Tensor, " times"]
    prediction_type: PredictionType
    scheduler: SchedulerMixin

    @staticmethod
    def from_scheduler(scheduler: SchedulerMixin) -> "TablePath":
        """See `NoisePath.from_scheduler`."""
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in get_args(PredictionType):
            raise ValueError(f"prediction_type {kind!r}; expected one of {', '.join(get_args(PredictionType))}")
        if not isinstance(scheduler, DDIMScheduler):
            scheduler = as_ddim(scheduler)
        count = scheduler.config.num_train_timesteps
        if len(scheduler.alphas_cumprod) != count:
            raise ValueError(
                f"the scheduler has num_train_timesteps {count} and {len(scheduler.alphas_cumprod)} trained_betas; "
                "expected as many"
            )
        squares = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.reshape(1)]).double()
        if kind == "epsilon" and bool((squares <= 0).any()):
            raise ValueError(
                f"the scheduler has prediction_type 'epsilon' and rescale_betas_zero_snr "
                f"{scheduler.config.rescale_betas_zero_snr}: at its last time alpha is 0, where a prediction of the "
                "noise says nothing of the image; expected prediction_type 'v_prediction', or rescale_betas_zero_snr "
                "False, whichever the network was trained with"
            )
        return TablePath(alpha=squares.sqrt(), sigma=(1 - squares).sqrt(), prediction_type=kind, scheduler=scheduler)

    @property
    def length(self) -> int:
        """The number of times, the final one not counted."""
        return len(self.alpha) - 1

    def at(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._tables_on(like.device, at_least_float32(like).dtype)
        index: int | Tensor
        if isinstance(t, int):
            index = t if t >= 0 else self.length
        else:
            index = torch.as_tensor(t, device=like.device).reshape(-1)
            index = torch.where(index < 0, self.length, index)
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha[index].reshape(shape), sigma[index].reshape(shape)

    def _tables_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha and sigma where they are used, copied once: small copies at every step would keep a GPU waiting."""
        if (device, dtype) not in self._tables:
            with torch.inference_mode(False):  # kept longer than the mode they are first asked for in
                self._tables[device, dtype] = (self.alpha.to(device, dtype), self.sigma.to(device, dtype))
        return self._tables[device, dtype]

    @cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]]:
        return {}

    def share(self, t: Time) -> Float[Tensor, " times"]:
        return (torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1) / (self.length - 1)).clamp(0, 1)

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.length, (1,), generator=generator)

    def network_time(self, t: Time) -> Tensor:
        return torch.as_tensor(t)

    def steps(self, count: int) -> list[tuple[Time, Time]]:
        """As DDIM spaces them; s is FINAL where it lies before the table.

        Raises:
            ValueError: for a count outside [1, number of training times].
        """
        if not 1 <= count <= self.length:
            raise ValueError(f"{count} sampling steps; expected 1 to {self.length}")
        self.scheduler.set_timesteps(count)
        first = int(self.scheduler.timesteps.max())
        if first >= self.length:
            raise ValueError(f"{count} sampling steps start at time {first}; expected {self.length - 1} at most")
        stride = self.length // count
        # DDIM steps from t to t - stride, whatever comes next in the list of times.
        return [(t, max(t - stride, FINAL)) for t in self.scheduler.timesteps.tolist()]

    def target(
        self, x_0: Float[Tensor, "batch *shape"], e: Float[Tensor, "batch *shape"], t: Time
    ) -> Float[Tensor, "batch *shape"]:
        alpha, sigma = self.at(t, x_0)
        match self.prediction_type:
            case "epsilon":
                return e
            case "v_prediction":
                return alpha * e - sigma * x_0
            case "sample":
                return x_0

    def clean_and_noise(
        self, x_t: Float[Tensor, "batch *shape"], prediction: Float[Tensor, "batch *shape"], t: Time
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
        """See `NoisePath`.

        epsilon: e = prediction. v (arXiv:2202.00512): x_0 = alpha x_t - sigma v, e = sigma x_t + alpha v.
        sample: x_0 = prediction.
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

    def describe(self) -> dict[str, Any]:
        config = self.scheduler.config
        names = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr"]
        values = {name: config.get(name) for name in (*names, "set_alpha_to_one")}
        table = torch.cat([self.alpha, self.sigma]).to(torch.float32).numpy().tobytes()
        trained = {"alpha_sigma_sha256": hashlib.sha256(table).hexdigest()} if config.get("trained_betas") else {}
        return {"family": "variance_preserving", "prediction_type": self.prediction_type} | values | trained


@dataclass(frozen=True, kw_only=True)
class FlowPath(NoisePath):
    """Flow matching (rectified flow, arXiv:2209.03003): x_t = (1 - t) x_0 + t e, and the prediction is e - x_0.

    A time is sigma itself, a number in (0, 1]; 0.0 is the end of the last step. There is no table, so any number of
    steps is exact.

    The steps are linspace(1, 1/N), shifted as the scheduler says. The scheduler's default grid ends on a sigma near 0,
    and a step from there to 0 dominates every ratio of densities and every KL.

    Attributes:
        mu: the shift of a scheduler whose shift depends on the size of images (`use_dynamic_shifting`); the backbone
            knows it (`Backbone.bind`).
    """

    scheduler: SchedulerMixin
    mu: float | None = None
    prediction_type: Literal["flow"] = "flow"

    def at(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = (-1, *[1] * (like.ndim - 1)), at_least_float32(like).dtype
        if isinstance(t, Tensor):
            sigma = t.to(like.device, torch.float64).reshape(shape)
            return (1 - sigma).to(dtype), sigma.to(dtype)
        # filled in on the device: a copy from the host at every step would keep a GPU waiting
        alpha, sigma = (like.new_full([1] * like.ndim, value, dtype=dtype) for value in (1.0 - t, float(t)))
        return alpha, sigma

    def share(self, t: Time) -> Float[Tensor, " times"]:
        return torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1).clamp(0, 1)

    def draw(self, generator: torch.Generator) -> Tensor:
        return 1 - torch.rand(1, generator=generator)

    def network_time(self, t: Time) -> Tensor:
        """num_train_timesteps · sigma, in float32."""
        return torch.as_tensor(t, dtype=torch.float32) * self.scheduler.config.num_train_timesteps

    def steps(self, count: int) -> list[tuple[Time, Time]]:
        """linspace(1, 1/N), shifted by the scheduler.

        Raises:
            ValueError: for a count below 1, and a shift that depends on the size of images where `mu` is None.
        """
        if count < 1:
            raise ValueError(f"{count} sampling steps; expected 1 or more")
        if self.scheduler.config.use_dynamic_shifting and self.mu is None:
            raise ValueError(
                "the scheduler has use_dynamic_shifting True, so its steps depend on the size of images, which this "
                "model family does not take into account; set shift instead"
            )
        sigmas = torch.linspace(1, 1 / count, count, dtype=torch.float64).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, mu=self.mu)
        return list(pairwise(self.scheduler.sigmas.tolist()))

    def target(
        self, x_0: Float[Tensor, "batch *shape"], e: Float[Tensor, "batch *shape"], t: Time
    ) -> Float[Tensor, "batch *shape"]:
        return e - x_0

    def clean_and_noise(
        self, x_t: Float[Tensor, "batch *shape"], prediction: Float[Tensor, "batch *shape"], t: Time
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
        """x_0 = x_t - t v, e = x_t + (1 - t) v."""
        x_t, prediction = at_least_float32(x_t), at_least_float32(prediction)
        alpha, sigma = self.at(t, x_t)
        return x_t - sigma * prediction, x_t + alpha * prediction

    def describe(self) -> dict[str, Any]:
        """What decides the path and the grid of steps; not `mu`, which follows from the image size."""
        names = ["num_train_timesteps", "shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type"]
        names += ["base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"]
        names += ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
        values = {name: self.scheduler.config.get(name) for name in names}
        return {"family": "flow", "prediction_type": self.prediction_type, "grid": "linspace(1, 1/N)"} | values
