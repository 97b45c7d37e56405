"""Settings of a training run: YAML by `--config`, any field as a flag. Importing this module does not import torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stepfuse.data.names import nearest
from stepfuse.data.seeds import LIMIT
from stepfuse.data.settings_file import check_types, require

if TYPE_CHECKING:
    from stepfuse.fuse.diffusion.variance import VarianceSchedule
    from stepfuse.rewards.shaping import Shaping

# Headings of `--help`, in this order.
BASE = "base model"
OBJECTIVE = "objective and reward"
PROMPTS = "prompts"
RUN = "run"
LORA = "LoRA"
SAMPLING = "sampling during training"
OPTIMISER = "loss and optimiser"
HEALTH = "health checks"
VALIDATION = "validation"
DPO = "DPO"
PAIRS = "preference pairs of a data set (Diffusion-DPO)"
DDPO = "DDPO"

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def _setting(default: Any, group: str, help_text: str) -> Any:
    """Declare a field, with the heading that `--help` lists it under and what it says there.

    The default is added to the help by the parser.
    """
    metadata = {"group": group, "help": help_text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that DPO and DDPO share. Names follow diffusers' LoRA scripts and trl."""

    algorithm = ""  # also the folder of its packaged configurations

    pretrained_model_name_or_path: str = _setting(
        "emoji",
        BASE,
        "Base model: a hub id, the folder of a diffusers pipeline, or `emoji` for the small model that is embedded.",
    )
    revision: str | None = _setting(None, BASE, "Revision of the base model on the hub: a branch, tag or commit.")
    variant: str | None = _setting(None, BASE, "Variant of the base model's weight files, for example `fp16`.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _setting(
        None,
        BASE,
        "Precision of the base model; LoRA weights and log-probabilities are float32. Unset, the precision that "
        "accelerate is configured with.",
    )

    reward: str = _setting(
        "clip_score",
        OBJECTIVE,
        "Reward to increase: a name from `stepfuse reward list`, path/to/file.py:function, path/to/file.yaml, "
        "http://HOST:PORT, or `weighted:` and a sum such as 0.5*compressibility/0.2 + 0.5*clip_score/6.",
    )
    reward_shift: float = _setting(0.0, OBJECTIVE, "Number that is subtracted from the reward.")
    reward_scale: float = _setting(
        1.0,
        OBJECTIVE,
        "Number that the shifted reward is divided by. It sets the unit of beta, margin and reward_clip; normalised "
        "advantages do not depend on it.",
    )
    reward_clip: list[float] = _setting(
        [], OBJECTIVE, "Lower and upper bound that the shifted and scaled reward is clipped to. Unset, no clipping."
    )
    fit_reward: int = _setting(
        0,
        OBJECTIVE,
        "Number of images of the base model on which reward_shift and reward_scale are fitted, to mean 0 and standard "
        "deviation 1, before training. 0 does not fit them.",
    )
    async_scoring: bool = _setting(
        True, OBJECTIVE, "Compute the rewards of one micro-batch while the next one is sampled."
    )
    objective_name: str = _setting(
        "", OBJECTIVE, "Name of the objective in adapter sets and in weights. Unset, the name of the reward."
    )

    prompts: str = _setting(
        "emoji",
        PROMPTS,
        "Training prompts: a text file with one prompt per line, or one of the sets emoji, colours, dpok, partiprompts "
        "and pick-a-pic. SET:COUNT takes COUNT of its prompts, evenly spaced.",
    )
    dataset_name: str | None = _setting(
        None, PROMPTS, "Hub data set that the training prompts are taken from, instead of `prompts`."
    )
    dataset_split: str = _setting("train", PROMPTS, "Split of the data set.")
    caption_column: str = _setting("caption", PROMPTS, "Column of the data set that holds the prompts.")

    output_dir: str = _setting(
        "outputs/adapter", RUN, "Folder that the adapter, checkpoints, sample images and logs are written to."
    )
    overwrite: bool = _setting(
        False,
        RUN,
        "Delete the files of an earlier run in output_dir once the new run has started. Files that were not written by "
        "training stay.",
    )
    resume_from_checkpoint: str | None = _setting(
        None,
        RUN,
        "Checkpoint to resume from: a folder such as checkpoint-500, or `latest` for the newest intact one in "
        "output_dir, or from the start if there is none.",
    )
    seed: int = _setting(0, RUN, "Seed of all random numbers.")
    max_train_steps: int = _setting(100, RUN, "Number of optimiser steps.")
    train_batch_size: int = _setting(
        8,
        RUN,
        "Images per process in a micro-batch. An optimiser step has train_batch_size × gradient_accumulation_steps × "
        "processes images.",
    )
    gradient_accumulation_steps: int = _setting(1, RUN, "Micro-batches per optimiser step.")
    checkpointing_steps: int = _setting(500, RUN, "Optimiser steps between two checkpoints.")
    checkpoints_total_limit: int | None = _setting(
        2, RUN, "Number of checkpoints to keep; the oldest is deleted. `none` keeps all."
    )
    logging_dir: str = _setting("logs", RUN, "Folder of the trackers' logs, inside output_dir.")
    report_to: str = _setting(
        "tensorboard",
        RUN,
        f"Experiment trackers, separated by commas: {', '.join(TRACKERS)}; `all` for those that are installed, or "
        "`none`.",
    )
    gradient_checkpointing: bool = _setting(
        False, RUN, "Recompute activations in the backward pass, which takes less memory and more time."
    )
    compile: Literal["no", "regional", "full"] = _setting(
        "no", RUN, "Compile the UNet's repeated blocks (`regional`) or the whole UNet (`full`) with torch.compile."
    )
    offload_text_encoders: bool = _setting(
        False, RUN, "Keep the text encoders in CPU memory and encode the prompts there."
    )
    allow_tf32: bool = _setting(False, RUN, "Use TF32 for float32 matrix products on Ampere and newer GPUs.")

    rank: int = _setting(4, LORA, "Rank of the LoRA matrices.")
    lora_alpha: int | None = _setting(
        None, LORA, "LoRA alpha; the update is scaled by alpha / rank. Unset, alpha is the rank."
    )
    lora_target_modules: list[str] = _setting(
        ["to_q", "to_k", "to_v", "to_out.0"],
        LORA,
        "Names, or ends of names, of the UNet's modules that get a LoRA. The default is all attention projections.",
    )

    sample_num_steps: int = _setting(20, SAMPLING, "Number of denoising steps of an image.")
    sample_guidance_scale: float = _setting(5.0, SAMPLING, "Scale of classifier-free guidance.")
    guidance: Literal["shared", "full", "off"] = _setting(
        "shared",
        SAMPLING,
        "Source of the unconditional prediction: the base model (`shared`), or base model and LoRA (`full`). `off` "
        "samples without classifier-free guidance.",
    )
    variance: Literal["eta", "table", "learned"] = _setting(
        "eta",
        SAMPLING,
        "Variance of the denoising steps: one eta for all (`eta`), one eta per step (`table`), or offsets that are "
        "trained with the LoRA (`learned`).",
    )
    sample_eta: float = _setting(
        1.0, SAMPLING, "DDIM's eta in (0, 1] for `eta`, and the initial one for `learned`; 1 is ancestral sampling."
    )
    sample_etas: list[float] = _setting([], SAMPLING, "Etas for `table`, one per step, noisiest step first.")
    variance_knots: int = _setting(
        5, SAMPLING, "Number of offsets for `learned`, evenly spaced over time and interpolated linearly."
    )
    resolution: int | None = _setting(
        None, SAMPLING, "Height and width of the images in pixels. Unset, the base model's default."
    )
    skip_first_steps: int = _setting(
        0, SAMPLING, "Number of steps, noisiest first, that are sampled but not trained on. SPO skips 4 of 20."
    )
    train_timestep_fraction: float = _setting(
        1.0, SAMPLING, "Fraction of the denoising steps to train on, drawn at random for every rollout."
    )
    timesteps_per_forward: int = _setting(
        1,
        SAMPLING,
        "Number of denoising steps of an image in one forward pass of the loss. From 2 on, base model and LoRA also "
        "share the rollout's forward passes. Faster if train_batch_size does not fill the GPU, with more memory.",
    )

    beta: float = _setting(
        0.01,
        OPTIMISER,
        "Coefficient of the KL divergence to the base model. For DPO, beta of its loss; for DDPO, weight of a KL term, "
        "and with 0 there is none and the base model is not evaluated.",
    )
    log_prob_reduction: Literal["sum", "mean"] = _setting(
        "sum",
        OPTIMISER,
        "Reduction of log-probabilities over latent dimensions: `sum` is the log-density; `mean` divides it by the "
        "number of dimensions, as the code of DDPO and SPO does.",
    )
    learning_rate: float = _setting(1e-4, OPTIMISER, "Initial learning rate of the LoRA.")
    variance_learning_rate: float = _setting(1e-2, OPTIMISER, "Initial learning rate of learned variance offsets.")
    lr_scheduler: str = _setting(
        "constant", OPTIMISER, "Learning rate scheduler of diffusers, for example constant, linear or cosine."
    )
    lr_warmup_steps: int = _setting(0, OPTIMISER, "Optimiser steps of linear warm-up, if the scheduler has one.")
    adam_beta1: float = _setting(0.9, OPTIMISER, "AdamW's beta1, the decay rate of the gradient's mean.")
    adam_beta2: float = _setting(0.999, OPTIMISER, "AdamW's beta2, the decay rate of the squared gradient's mean.")
    adam_weight_decay: float = _setting(1e-4, OPTIMISER, "AdamW's weight decay of the LoRA.")
    adam_epsilon: float = _setting(1e-8, OPTIMISER, "AdamW's epsilon, which is added to the denominator.")
    max_grad_norm: float = _setting(1.0, OPTIMISER, "Maximum norm that the gradient is clipped to.")
    use_8bit_adam: bool = _setting(
        False, OPTIMISER, "Use bitsandbytes' AdamW with 8-bit state; pip install 'stepfuse[8bit]'."
    )

    nonfinite: Literal["stop", "skip"] = _setting(
        "stop",
        HEALTH,
        "What to do if a reward, loss or gradient is not finite: `stop` with an error, or `skip` the image or step and "
        "record it.",
    )
    max_kl: float | None = _setting(
        None,
        HEALTH,
        "Maximum KL divergence to the base model, in nats per image. Beyond it training stops, and the checkpoint with "
        "the highest validation reward becomes the adapter. Unset, no limit.",
    )
    load_best_model_at_end: bool = _setting(
        False, HEALTH, "Write the checkpoint with the highest validation reward as the adapter, not the last one."
    )
    min_diversity: float = _setting(
        0.2,
        HEALTH,
        "Fraction of the base model's image diversity below which a collapse is reported. 0 never reports one.",
    )

    validation_prompts: list[str] = _setting(
        [], VALIDATION, "Prompts of the validation images. Unset, some of the training prompts."
    )
    validation_set: str = _setting(
        "",
        VALIDATION,
        "Set or file of validation prompts, as `prompts` takes it, for example emoji-heldout; instead of "
        "validation_prompts.",
    )
    num_validation_images: int = _setting(8, VALIDATION, "Number of validation images.")
    validation_steps: int = _setting(
        0, VALIDATION, "Optimiser steps between two validations. 0 validates before and after training only."
    )

    def __post_init__(self) -> None:
        for name, word in (("guidance", "off"), ("mixed_precision", "no"), ("compile", "no")):
            if getattr(self, name) is False:  # what YAML makes of the bare word
                object.__setattr__(self, name, word)
        check_types(self)
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "rank", "sample_num_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("checkpointing_steps", "num_validation_images", "timesteps_per_forward"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(0 <= self.seed < LIMIT, "seed", self.seed, "an integer from 0 to 2^64 - 1")
        self._check_reward()
        self._check_trackers()
        limit = self.checkpoints_total_limit
        require(limit is None or limit >= 1, "checkpoints_total_limit", limit, "1 or more, or none")
        require(self.max_kl is None or self.max_kl > 0, "max_kl", self.max_kl, "a positive number of nats")
        require(0 <= self.min_diversity < 1, "min_diversity", self.min_diversity, "a number in [0, 1)")
        require(
            0 <= self.skip_first_steps < self.sample_num_steps,
            "skip_first_steps",
            self.skip_first_steps,
            "0 or more, below sample_num_steps",
        )
        fraction = self.train_timestep_fraction
        require(0 < fraction <= 1, "train_timestep_fraction", fraction, "a number in (0, 1]")
        both = bool(self.validation_prompts and self.validation_set)
        require(not both, "validation_set", self.validation_set, "none beside validation_prompts")
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        self._check_variance()
        for name, value in vars(self).items():
            require(not isinstance(value, float) or math.isfinite(value), name, value, "a finite number")

    def _check_reward(self) -> None:
        require(self.fit_reward != 1 and self.fit_reward >= 0, "fit_reward", self.fit_reward, "0, or 2 or more images")
        if self.fit_reward:
            fixed = (self.reward_shift, self.reward_scale)
            require(fixed == (0, 1), "reward_shift and reward_scale", fixed, "none beside fit_reward, which fits them")
        finite = float("-inf") < self.reward_shift < float("inf")
        require(finite, "reward_shift", self.reward_shift, "a finite number")
        require(0 < self.reward_scale < float("inf"), "reward_scale", self.reward_scale, "a positive number")
        bounds = self.reward_clip
        ordered = len(bounds) == 2 and bounds[0] < bounds[1]
        require(not bounds or ordered, "reward_clip", bounds, "two numbers, the lower first")

    def _check_trackers(self) -> None:
        for tracker in self.trackers:
            known = (*TRACKERS, "all")
            expected = f"`none`, or any of {', '.join(known)}{nearest(tracker, (*known, 'none'))}"
            require(tracker in known, "report_to", tracker, expected)

    def _check_variance(self) -> None:
        for eta in self.sample_etas if self.variance == "table" else [self.sample_eta]:
            require(0 <= eta <= 1, "sample_eta", eta, "a number in (0, 1]")
            require(eta > 0, "sample_eta", eta, "above 0: a deterministic step has no log-prob to train with")
        if self.variance == "table":
            require(bool(self.sample_etas), "sample_etas", self.sample_etas, "one eta per step for variance table")
        if self.variance == "learned":
            require(self.variance_knots >= 2, "variance_knots", self.variance_knots, "2 or more")

    @property
    def trackers(self) -> list[str]:
        """Names in `report_to`; empty for `none`."""
        names = [name.strip() for name in self.report_to.split(",") if name.strip()]
        return [] if names == ["none"] else names

    @property
    def keeps_best(self) -> bool:
        """Whether checkpoints are compared by the reward of the validation images."""
        return self.load_best_model_at_end or self.max_kl is not None

    @property
    def name(self) -> str:
        """The objective's name: as given, or the reward's without its argument or folder."""
        if self.objective_name:
            return self.objective_name
        own = self.reward.split(":")[-1 if ".py:" in self.reward else 0]
        return Path(own).stem if own.endswith((".yaml", ".yml")) else own.replace(".", "_")

    def initial_shaping(self) -> "Shaping":
        """The reward's shaping as configured; with `fit_reward` it is fitted later."""
        from stepfuse.rewards.shaping import Shaping

        return Shaping(shift=self.reward_shift, scale=self.reward_scale, clip=self.reward_clip)

    def initial_schedule(self) -> "VarianceSchedule":
        """The variance schedule that training starts from, which is also that of its reference."""
        import torch

        from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule

        match self.variance:
            case "eta":
                return EtaSchedule(eta=self.sample_eta)
            case "table":
                return TableSchedule(etas=tuple(self.sample_etas))
            case "learned":
                return LearnedSchedule(offsets=torch.zeros(self.variance_knots), eta=self.sample_eta)


@dataclass(frozen=True, kw_only=True)
class DPOSettings(TrainSettings):
    """Step-level DPO: candidates of one step, the best against the worst (MSDDA; SPO, arXiv:2406.04314)."""

    algorithm = "dpo"

    num_candidates: int = _setting(
        4, DPO, "Number of candidates x_s that are drawn from every x_t; the best and the worst form a pair. SPO: 4."
    )
    margin: float = _setting(0.0, DPO, "A pair is dropped unless its rewards differ by more than this.")
    label_smoothing: float = _setting(
        0.0, DPO, "Assumed probability that a preference is flipped, in [0, 0.5); as in trl's DPOConfig."
    )
    loss_type: Literal["sigmoid", "ipo"] = _setting(
        "sigmoid", DPO, "Loss on the difference of log-ratios: DPO's `sigmoid` or `ipo`; as in trl's DPOConfig."
    )
    train_clip_range: float = _setting(
        0.0,
        DPO,
        "Clamp the probability ratio to the base model, of winner and loser each, to 1 ± this; a clamped ratio has no "
        "gradient. SPO's eps: 0.1, with log_prob_reduction mean. 0 does not clamp.",
    )

    pairs: str = _setting(
        "",
        PAIRS,
        "Train on the preference pairs of a data set instead of rollouts (arXiv:2311.12908): a hub data set, a parquet "
        "file, or a folder.",
    )
    image_columns: list[str] = _setting(["jpg_0", "jpg_1"], PAIRS, "Columns of the two images of a pair.")
    label_column: str = _setting(
        "label_0",
        PAIRS,
        "Column of the preference: 1 if the first image is preferred, 0 if the second is. Other values are ties, which "
        "are dropped.",
    )
    pairs_shuffle_buffer: int = _setting(
        1000, PAIRS, "Size of the shuffle buffer: the number of pairs that the next one is drawn from."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_candidates >= 2, "num_candidates", self.num_candidates, "2 or more")
        require(self.margin >= 0, "margin", self.margin, "0 or more")
        require(0 < self.beta < float("inf"), "beta", self.beta, "a positive number")
        require(len(self.image_columns) == 2, "image_columns", self.image_columns, "two names")
        require(self.pairs_shuffle_buffer >= 1, "pairs_shuffle_buffer", self.pairs_shuffle_buffer, "1 or more")
        clip = self.train_clip_range
        require(0 <= clip < 1, "train_clip_range", clip, "0, for none, or a number in (0, 1)")
        if self.pairs:
            require(self.max_kl is None, "max_kl", self.max_kl, "none with pairs, of which no KL of steps is measured")
            require(self.variance != "learned", "variance", self.variance, "eta or table with pairs, which teach none")
            require(clip == 0, "train_clip_range", clip, "0 with pairs: Diffusion-DPO's loss has no clamp")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "a number in [0, 0.5)")


@dataclass(frozen=True, kw_only=True)
class DDPOSettings(TrainSettings):
    """Policy gradient on denoising steps (DDPO, arXiv:2305.13301) with an exact per-step KL to the base."""

    algorithm = "ddpo"

    num_generations: int = _setting(8, DDPO, "Number of images per prompt in an optimiser step: a group.")
    per_prompt_stat_tracking: bool = _setting(
        True,
        DDPO,
        "Normalise advantages per prompt, by the mean and standard deviation of the rewards of its group in this step; "
        "otherwise over all images of the step. ddpo-pytorch's setting of this name keeps a buffer of earlier rewards: "
        "see the next two.",
    )
    per_prompt_stat_tracking_buffer_size: int = _setting(
        0,
        DDPO,
        "Number of rewards to remember per prompt over the steps, with which its advantages are normalised, as "
        "ddpo-pytorch and trl do (16 there). 0 remembers none: statistics are those of this step's group.",
    )
    per_prompt_stat_tracking_min_count: int = _setting(
        0,
        DDPO,
        "Number of remembered rewards below which a prompt's advantages are normalised over all images of the step, as "
        "in ddpo-pytorch and trl (16 there).",
    )
    scale_rewards: bool = _setting(
        True, DDPO, "Divide advantages by the standard deviation; otherwise only the mean is subtracted."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = _setting(
        "sum_then_normalize",
        DDPO,
        "For a `weighted:` reward: normalise the weighted sum, or normalise each term and then sum (GDPO, "
        "arXiv:2601.05242).",
    )
    train_clip_range: float = _setting(
        0.2, DDPO, "Clip the probability ratio to the policy of the rollout to 1 ± this (PPO); ddpo-pytorch: 1e-4."
    )
    train_adv_clip_max: float = _setting(5.0, DDPO, "Clip advantages to ± this; ddpo-pytorch: 5.")
    num_inner_epochs: int = _setting(1, DDPO, "Number of optimiser steps on each rollout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_generations >= 1, "num_generations", self.num_generations, "1 or more")
        require(self.num_inner_epochs >= 1, "num_inner_epochs", self.num_inner_epochs, "1 or more")
        require(0 <= self.beta < float("inf"), "beta", self.beta, "0, for none, or a positive number")
        without = self.max_kl is None and self.variance != "learned"
        require(
            self.beta > 0 or without,
            "beta",
            self.beta,
            "a positive number beside max_kl or a learned variance, which need the base",
        )
        require(self.train_clip_range > 0, "train_clip_range", self.train_clip_range, "a positive number")
        self._check_statistics()
        if self.multi_objective_aggregation == "normalize_then_sum":
            wanted = "a weighted: sum, for multi_objective_aggregation normalize_then_sum"
            require(self.reward.startswith("weighted:"), "reward", self.reward, wanted)
            shaping = (self.reward_shift, self.reward_scale, self.reward_clip)
            none = "none of them with normalize_then_sum, which normalises each term by itself"
            require(shaping == (0, 1, []), "reward_shift, reward_scale and reward_clip", shaping, none)

    def _check_statistics(self) -> None:
        """Check how advantages are normalised."""
        size, least = self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count
        buffer, count = "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count"
        require(size >= 0, buffer, size, "0, for none, or the number of rewards to remember")
        require(0 <= least <= size, count, least, f"0 or more, and no more than {buffer} ({size})")
        if size:
            require(self.per_prompt_stat_tracking, buffer, size, "0 without per_prompt_stat_tracking")
            aggregation = self.multi_objective_aggregation
            require(
                aggregation == "sum_then_normalize", buffer, size, f"0 with multi_objective_aggregation {aggregation}"
            )
        elif self.per_prompt_stat_tracking:
            require(self.num_generations >= 2, "num_generations", self.num_generations, "2 or more per prompt")
