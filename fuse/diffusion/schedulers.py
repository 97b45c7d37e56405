"""Schedulers of diffusers: which configurations are supported, and DDIM on the noise path of another scheduler."""

import inspect
from typing import Literal, get_args

import torch
from diffusers import DDIMScheduler, SchedulerMixin

from stepfuse.fuse.diffusion.configuration import Expected

DiscretePrediction = Literal["epsilon", "v_prediction", "sample"]

# What diffusers' DDIMScheduler takes for the schedule of Stable Diffusion.
STABLE_DIFFUSION = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)

# Keys that decide the path or the spacing of steps, which are taken over, and keys of how other samplers integrate,
# which are ignored: the sampler that a base is published with does not change its network. `prediction_type` and
# `rescale_betas_zero_snr` are checked by `as_ddim`; with `use_dynamic_shifting` a `FlowPath` needs mu.
SCHEDULER_HANDLED = frozenset(
    {
        *("algorithm_type", "base_image_seq_len", "base_shift", "beta_end", "beta_schedule", "beta_start"),
        *("clip_sample_range", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio"),
        *("euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped"),
        *("lower_order_final", "max_image_seq_len", "max_shift", "num_train_timesteps", "original_inference_steps"),
        *("predict_x0", "prediction_type", "predictor_order", "rescale_betas_zero_snr", "sample_max_value"),
        *("set_alpha_to_one", "shift", "shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order"),
        *("solver_p", "solver_type", "steps_offset", "stochastic_sampling", "tau_func", "time_shift_type"),
        *("timestep_scaling", "timestep_spacing", "trained_betas", "use_beta_sigmas", "use_dynamic_shifting"),
        *("use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type"),
    }
)
CLIPS = "its steps would not be Gaussian in the prediction; set it to False in the scheduler's configuration"
SCHEDULER_EXPECTED = {
    "clip_sample": Expected((False,), CLIPS),
    "thresholding": Expected((False,), CLIPS),
    "invert_sigmas": Expected((False,), "noise must come first"),
    "timestep_type": Expected(("discrete",), "the times given to the network must be those of the training table"),
    "use_flow_sigmas": Expected((False,), "take FlowMatchEulerDiscreteScheduler for flow matching"),
}


def as_ddim(scheduler: SchedulerMixin) -> DDIMScheduler:
    """The DDIM scheduler on the noise path of a DDPM-type scheduler: the same one if it is DDIM.

    Raises:
        ValueError: for a scheduler of another family, a path that DDIM does not have, and a network whose prediction
            does not determine the image all along it.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no noise path known here; expected a DDPM-type scheduler "
            "(with alphas_cumprod) or FlowMatchEulerDiscreteScheduler"
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in get_args(DiscretePrediction):
        raise ValueError(f"prediction_type {kind!r}; expected one of {', '.join(get_args(DiscretePrediction))}")
    ddim = scheduler if isinstance(scheduler, DDIMScheduler) else _converted(scheduler)
    count = ddim.config.num_train_timesteps
    if len(ddim.alphas_cumprod) != count:
        raise ValueError(
            f"the scheduler has num_train_timesteps {count} and {len(ddim.alphas_cumprod)} trained_betas; "
            "expected as many"
        )
    if kind == "epsilon" and bool((ddim.alphas_cumprod <= 0).any()):
        raise ValueError(
            f"the scheduler has prediction_type 'epsilon' and rescale_betas_zero_snr "
            f"{ddim.config.rescale_betas_zero_snr}: at its last time alpha is 0, where a prediction of the noise says "
            "nothing of the image; expected prediction_type 'v_prediction', or rescale_betas_zero_snr False, whichever "
            "the network was trained with"
        )
    return ddim


def _converted(scheduler: SchedulerMixin) -> DDIMScheduler:
    # Bare from_config would fill in DDIM's defaults for whatever was left at its class's default.
    taken = inspect.signature(DDIMScheduler.__init__).parameters
    choices = [{"clip_sample": False} | {k: v for k, v in scheduler.config.items() if k in taken}]
    betas = getattr(scheduler, "betas", None)
    if betas is not None:  # a schedule that DDIM has no name for
        known = {"beta_schedule": "linear", "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
        choices.append(choices[0] | known)
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
