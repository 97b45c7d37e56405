"""Noise paths x_t = alpha_t x_0 + sigma_t e, and what a network's prediction says on them.

Nothing outside this file knows of which family a model is.
"""

import copy
import hashlib
import inspect
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.configuration import Expected, check_configuration
from stepfuse.fuse.diffusion.gaussian import at_least_float32

FINAL = -1  # the position after the last step
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


# What diffusers' DDIMScheduler takes for the schedule of Stable Diffusion.
STABLE_DIFFUSION = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


# Keys that decide the path or the spacing of steps, and are taken over, and keys of how other samplers integrate: which
# sampler a base comes with does not change its network.
SCHEDULER_HANDLED = frozenset(
    {
        "algorithm_type",
        "base_image_seq_len",
        "base_shift",
        "beta_end",
        "beta_schedule",
        "beta_start",
        "clip_sample_range",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "max_image_seq_len",
        "max_shift",
        "num_train_timesteps",
        "original_inference_steps",
        "predict_x0",
        "prediction_type",  # checked below
        "predictor_order",
        "rescale_betas_zero_snr",  # checked below
        "sample_max_value",
        "set_alpha_to_one",
        "shift",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "stochastic_sampling",
        "tau_func",
        "time_shift_type",
        "timestep_scaling",
        "timestep_spacing",
        "trained_betas",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)
CLIPS = "its steps would not be Gaussian in the prediction; set it to False in the scheduler's configuration"
SCHEDULER_EXPECTED = {
    "clip_sample": Expected((False,), CLIPS),
    "thresholding": Expected((False,), CLIPS),
    "invert_sigmas": Expected((False,), "noise must come first"),
    "timestep_type": Expected(("discrete",), "the network must be told positions of the training table"),
    "use_flow_sigmas": Expected((False,), "take FlowMatchEulerDiscreteScheduler for flow matching"),
    "use_dynamic_shifting": Expected((False,), "the shift must not depend on the size of images; set shift instead"),
}


@dataclass(frozen=True, kw_only=True)
class NoisePath:
    """The coefficients of one diffusers scheduler, and its rule for choosing time steps.

    A time is a position in the scheduler's training table. `FINAL` (-1) is the end of the last
    step, with the scheduler's own final alpha.

    Attributes:
        alpha: alpha_t by position, float64, the final one last (so that position -1 finds it).
        sigma: sigma_t by position, likewise.
        prediction_type: what the network predicts.
        scheduler: the scheduler that spaces the steps.
    """

    alpha: Float[Tensor, " times"]
    sigma: Float[Tensor, " times"]
    prediction_type: PredictionType
    scheduler: SchedulerMixin

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "NoisePath":
        """The path of a diffusers scheduler.

        DDPM-type schedulers give alpha_t² = `alphas_cumprod` (DDIM, arXiv:2010.02502), flow
        matching alpha_t = 1 - sigma_t. A DDPM-type scheduler that is not DDIM is replaced by the
        DDIM scheduler on the same path; how it would have integrated (`use_karras_sigmas`, `solver_order`, …) is
        ignored, and its spacing of steps is kept.

        Raises:
            ValueError: for a scheduler of another family, one that clips predictions, a network that predicts noise
                where the path holds nothing else (`rescale_betas_zero_snr`), and options that are not known.
        """
        scheduler = copy.deepcopy(scheduler)  # `steps` sets its time steps
        check_configuration("the scheduler", scheduler, handled=SCHEDULER_HANDLED, expected=SCHEDULER_EXPECTED)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            # Position i is sigma = (i + 1) / 1000; `steps` rounds the scheduler's sigmas onto it.
            sigma = torch.linspace(0, 1, scheduler.config.num_train_timesteps + 1, dtype=torch.float64)[1:]
            sigma = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
            return cls(alpha=1 - sigma, sigma=sigma, prediction_type="flow", scheduler=scheduler)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no noise path known here; expected a DDPM-type scheduler "
                "(with alphas_cumprod) or FlowMatchEulerDiscreteScheduler"
            )
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in get_args(PredictionType):
            raise ValueError(f"prediction_type {kind!r}; expected one of {', '.join(get_args(PredictionType))}")
        if not isinstance(scheduler, DDIMScheduler):
            scheduler = _ddim(scheduler)
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
        return cls(alpha=squares.sqrt(), sigma=(1 - squares).sqrt(), prediction_type=kind, scheduler=scheduler)

    def describe(self) -> dict[str, Any]:
        """What decides alpha_t and sigma_t, and what is predicted, as plain JSON values."""
        config = self.scheduler.config
        names = ["num_train_timesteps"]
        if self.prediction_type != "flow":
            names += ["beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "set_alpha_to_one"]
        values = {name: config.get(name) for name in names}
        table = torch.cat([self.alpha, self.sigma]).to(torch.float32).numpy().tobytes()
        own = {"alpha_sigma_sha256": hashlib.sha256(table).hexdigest()} if config.get("trained_betas") else {}
        family = "flow" if self.prediction_type == "flow" else "variance_preserving"
        return {"family": family, "prediction_type": self.prediction_type} | values | own

    @property
    def length(self) -> int:
        """The number of positions, the final one not counted."""
        return len(self.alpha) - 1

    def steps(self, count: int) -> list[tuple[int, int]]:
        """The (t, s) of a sampler with `count` steps, as the scheduler spaces them; s is FINAL past the table.

        Raises:
            ValueError: for a count outside [1, number of training steps].
        """
        if not 1 <= count <= self.length:
            raise ValueError(f"{count} sampling steps; expected 1 to {self.length}")
        if self.prediction_type == "flow":
            self.scheduler.set_timesteps(count)
            times = [max(round(float(sigma) * self.length) - 1, 0) for sigma in self.scheduler.sigmas]
            times[-1] = FINAL
            if len(set(times)) < len(times):
                raise ValueError(
                    f"{count} sampling steps round onto fewer of the {self.length} positions; take fewer steps"
                )
            return list(pairwise(times))
        self.scheduler.set_timesteps(count)
        first = int(self.scheduler.timesteps.max())
        if first >= self.length:
            raise ValueError(f"{count} sampling steps start at time {first}; expected {self.length - 1} at most")
        stride = self.length // count
        # DDIM steps from t to t - stride, whatever comes next in the list of times.
        return [(t, max(t - stride, FINAL)) for t in self.scheduler.timesteps.tolist()]

    def network_time(self, t: Tensor | int) -> Tensor:
        """The time a network is told: the position itself, or 1000 sigma for flow matching."""
        return torch.as_tensor(t) + (1 if self.prediction_type == "flow" else 0)

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), shaped to broadcast against `like`; t is one position or one a sample."""
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

    def ancestral_variance(self, t: Tensor | int, s: Tensor | int, like: Tensor) -> Tensor:
        """sigma_s² / sigma_t² (sigma_t² - alpha_t² / alpha_s² sigma_s²): the step variance of DDIM with eta 1.

        On a DDPM-type path this is (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s), the posterior variance (DDIM, eq. 16).
        """
        alpha_t, sigma_t = self.at(t, like.double())
        alpha_s, sigma_s = self.at(s, like.double())
        variance = sigma_s**2 / sigma_t**2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        return variance.clamp(min=0).to(at_least_float32(like).dtype)  # rounding may leave -1e-19

    def noised(
        self, x_0: Float[Tensor, "batch *shape"], e: Float[Tensor, "batch *shape"], t: Tensor | int
    ) -> Float[Tensor, "batch *shape"]:
        """x_t = alpha_t x_0 + sigma_t e."""
        alpha, sigma = self.at(t, x_0)
        return alpha * x_0 + sigma * e

    def target(
        self, x_0: Float[Tensor, "batch *shape"], e: Float[Tensor, "batch *shape"], t: Tensor | int
    ) -> Float[Tensor, "batch *shape"]:
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

    def clean_and_noise(
        self, x_t: Float[Tensor, "batch *shape"], prediction: Float[Tensor, "batch *shape"], t: Tensor | int
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
        """The (x_0, e) that a prediction stands for, with x_t = alpha_t x_0 + sigma_t e.

        epsilon: e = prediction. v (arXiv:2202.00512): x_0 = alpha x_t - sigma v, e = sigma x_t + alpha v.
        sample: x_0 = prediction. flow: v = e - x_0.
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


def _ddim(scheduler: SchedulerMixin) -> DDIMScheduler:
    """The DDIM scheduler on the noise path of another DDPM-type scheduler.

    Raises:
        ValueError: for a scheduler whose path DDIM does not have.
    """
    # Bare from_config would fill in DDIM's defaults for whatever was left at its class's default.
    taken = inspect.signature(DDIMScheduler.__init__).parameters
    config = {"clip_sample": False} | {k: v for k, v in scheduler.config.items() if k in taken}
    betas = getattr(scheduler, "betas", None)
    choices = [config]
    if betas is not None:  # a schedule that DDIM has no name for
        known = {"beta_schedule": "linear", "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
        choices.append(config | known)
    for choice in choices:
        try:
            found = DDIMScheduler.from_config(choice)
        except NotImplementedError:
            continue
        got, wanted = found.alphas_cumprod.double(), scheduler.alphas_cumprod.double()
        if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-4, atol=1e-6):
            return found
    raise ValueError(
        f"{type(scheduler).__name__} has a noise path that DDIM does not have; expected the scheduler's betas to give "
        "its alphas_cumprod"
    )
