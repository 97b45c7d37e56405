"""Settings of the policy: LoRA, sampling, optimiser and validation. Importing this does not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepfuse.data.settings_fields import setting
from stepfuse.data.settings_file import require
from stepfuse.fuse.rules.schedules import SCHEDULES, initial_schedule

if TYPE_CHECKING:
    from stepfuse.fuse.diffusion.variance import VarianceSchedule

# Those of diffusers, except piecewise_constant, which needs a list of steps.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """LoRA.

    Attributes:
        rank: Rank of the LoRA matrices.
        lora_alpha: LoRA alpha; the update is scaled by alpha / rank. Unset, alpha is the rank.
        lora_target_modules: Names, or ends of names, of the network's modules that get a LoRA. Unset, all attention
            projections of the model family.
    """

    rank: int = setting(4, least=1)
    lora_alpha: int | None = setting(None, least=1)
    lora_target_modules: list[str] | None = setting(None)

    def check_together(self) -> None:
        require(self.lora_target_modules != [], "lora_target_modules", [], "one name or more")


@dataclass(frozen=True, kw_only=True)
class VarianceSettings:
    """Variance schedule.

    Attributes:
        variance: Variance of the denoising steps: one eta for all (`eta`), one eta per step (`table`), offsets that are
            trained with the LoRA (`learned`), the exact step of the SDE of flow matching (`sde`, with noise_level;
            1.414 is eta 1), a share of the noise variance (`share`, with share, as in CPS, which tends to no SDE and is
            for the number of steps that it is trained with), or another kind of schedule in `SCHEDULES`.
        variance_options: Parameters of other kinds of variance, as NAME=VALUE, such as noise_level=0.7 or share=0.794;
            in a YAML file, a mapping.
        sample_eta: DDIM's eta in (0, 1] for `eta`, and the initial one for `learned`; 1 is ancestral sampling.
        sample_etas: Etas for `table`, one per step, noisiest step first.
        variance_knots: Number of offsets for `learned`, evenly spaced over time and interpolated linearly.
    """

    variance: str = setting("eta", choices=SCHEDULES)
    variance_options: dict = setting({})
    sample_eta: float = 1.0
    sample_etas: list[float] = setting([])
    variance_knots: int = 5

    @property
    def trains_variance(self) -> bool:
        """Whether the schedule has parameters that are trained."""
        return bool(self.initial_schedule().trainable())

    def initial_schedule(self) -> "VarianceSchedule":
        """The variance schedule that training starts from."""
        return initial_schedule(self.variance, vars(self), self.variance_options)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Sampling during training.

    Attributes:
        sample_num_steps: Number of denoising steps of an image.
        sample_guidance_scale: Scale of classifier-free guidance.
        guidance: Source of the unconditional prediction: the base model (`shared`), or base model and LoRA (`full`).
            `off` samples without classifier-free guidance; `embedded` gives the scale to a guidance-distilled network.
        resolution: Height and width of the images in pixels. Unset, the base model's default.
        skip_first_steps: Number of steps, noisiest first, that are sampled but not trained on. SPO skips 4 of 20.
        skip_last_steps: Number of steps at the end that are sampled but not trained on. On a flow path that ends close
            to 0, one of them may dominate every ratio of densities and the KL divergence.
        train_timestep_fraction: Fraction of the denoising steps to train on, chosen at random for every rollout.
        timesteps_per_forward: Number of denoising steps of an image in one forward pass of the loss. From 2 on, base
            model and LoRA also share the rollout's forward passes. Faster if train_batch_size does not fill the GPU,
            with more memory.
    """

    sample_num_steps: int = setting(20, least=1)
    sample_guidance_scale: float = 5.0
    guidance: Literal["shared", "full", "off", "embedded"] = "shared"
    resolution: int | None = setting(None, least=1)
    skip_first_steps: int = setting(0, least=0)
    skip_last_steps: int = setting(0, least=0)
    train_timestep_fraction: float = setting(1.0, above=0, most=1)
    timesteps_per_forward: int = setting(1, least=1)

    def check_together(self) -> None:
        first, last = self.skip_first_steps, self.skip_last_steps
        require(first < self.sample_num_steps, "skip_first_steps", first, "0 or more, below sample_num_steps")
        together = f"0 or more, and with skip_first_steps ({first}) below sample_num_steps ({self.sample_num_steps})"
        require(first + last < self.sample_num_steps, "skip_last_steps", last, together)


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """Loss and optimiser.

    Attributes:
        beta: Coefficient of the KL divergence to the base model. For DPO, beta of its loss; for DDPO, weight of a KL
            term, and with 0 there is none and the base model is not evaluated.
        log_prob_reduction: Reduction of log-probabilities over latent dimensions: `sum` is the log-density; `mean`
            divides it by the number of dimensions, as the code of DDPO and SPO does.
        learning_rate: Initial learning rate of the LoRA.
        variance_learning_rate: Initial learning rate of learned variance offsets.
        lr_scheduler: Learning rate scheduler of diffusers.
        lr_warmup_steps: Optimiser steps of linear warm-up, if the scheduler has one.
        adam_beta1: AdamW's beta1, the decay rate of the gradient's mean.
        adam_beta2: AdamW's beta2, the decay rate of the squared gradient's mean.
        adam_weight_decay: AdamW's weight decay of the LoRA.
        adam_epsilon: AdamW's epsilon, which is added to the denominator.
        max_grad_norm: Maximum norm that the gradient is clipped to.
        use_8bit_adam: Use bitsandbytes' AdamW with 8-bit state; pip install 'stepfuse[8bit]'.
    """

    beta: float = setting(0.01, least=0, expected="0, for none, or a positive number")
    log_prob_reduction: Literal["sum", "mean"] = "sum"
    learning_rate: float = setting(1e-4, above=0)
    variance_learning_rate: float = setting(1e-2, least=0)
    lr_scheduler: str = setting("constant", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(0, least=0)
    adam_beta1: float = setting(0.9, least=0, below=1)
    adam_beta2: float = setting(0.999, least=0, below=1)
    adam_weight_decay: float = setting(1e-4, least=0)
    adam_epsilon: float = setting(1e-8, above=0)
    max_grad_norm: float = setting(1.0, above=0, finite=False)
    use_8bit_adam: bool = False


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """Health checks.

    Attributes:
        nonfinite: What to do if a reward, loss or gradient is not finite: `stop` with an error, or `skip` the image or
            step and record it.
        max_kl: Maximum KL divergence to the base model, in nats per image. Beyond it training stops, and the checkpoint
            with the highest validation reward becomes the adapter. Unset, no limit.
        load_best_model_at_end: Write the checkpoint with the highest validation reward as the adapter, not the last
            one.
        min_diversity: Fraction of the base model's image diversity below which a collapse is reported. 0 never reports
            one.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    max_kl: float | None = setting(None, above=0, finite=False, expected="a positive number of nats")
    load_best_model_at_end: bool = False
    min_diversity: float = setting(0.2, least=0, below=1)

    @property
    def keeps_best(self) -> bool:
        """Whether checkpoints are compared by the reward of the validation images."""
        return self.load_best_model_at_end or self.max_kl is not None


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Validation.

    Attributes:
        validation_prompts: Prompts of the validation images. Unset, some of the training prompts.
        validation_set: Set or file of validation prompts, as `prompts` takes it, for example emoji-heldout; instead of
            validation_prompts.
        num_validation_images: Number of validation images.
        validation_steps: Optimiser steps between two validations. 0 validates before and after training only.
    """

    validation_prompts: list[str] = setting([])
    validation_set: str = ""
    num_validation_images: int = setting(8, least=1)
    validation_steps: int = setting(0, least=0)

    def check_together(self) -> None:
        both = bool(self.validation_prompts and self.validation_set)
        require(not both, "validation_set", self.validation_set, "none beside validation_prompts")
