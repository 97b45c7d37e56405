"""Settings of a training run: YAML by `--config`, any field as a flag."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from stepfuse.data.names import nearest
from stepfuse.data.settings_file import check_types, read_settings, require
from stepfuse.fuse.variance import EtaSchedule, LearnedSchedule, TableSchedule, VarianceSchedule
from stepfuse.rewards.shaping import Shaping


def _setting(default: Any, help_text: str) -> Any:
    """A dataclass field whose help `--help` shows."""
    metadata = {"help": help_text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What DPO and DDPO have in common. Names follow diffusers' LoRA scripts and trl."""

    # The base and the objective.
    pretrained_model_name_or_path: str = _setting("emoji", "hub id or folder of the base, or `emoji`, the embedded one")
    revision: str | None = _setting(None, "revision of the base on the hub")
    variant: str | None = _setting(None, "variant of the weights, `fp16` for instance")
    reward: str = _setting(
        "clip_score",
        "name of the reward (`stepfuse reward list`), path/to/file.py:function, path/to/file.yaml, or http://HOST:PORT",
    )
    reward_shift: float = _setting(0.0, "subtracted from the reward")
    reward_scale: float = _setting(
        1.0, "what it is divided by then: the unit of beta, margin and clip; normalised advantages do not depend on it"
    )
    reward_clip: list[float] = _setting([], "bounds of what comes out, the lower and the upper")
    fit_reward: int = _setting(
        0, "images of the base on which shift and scale are fitted instead, to mean 0 and deviation 1; 0: none"
    )
    async_scoring: bool = _setting(True, "score one batch while the next is sampled")
    objective_name: str = _setting("", "how weights will call this objective; by default the reward's name")

    # Prompts.
    prompts: str = _setting(
        "emoji",
        "text file with a prompt a line, or a set: emoji, colours, dpok, partiprompts, pick-a-pic; :COUNT of it",
    )
    dataset_name: str | None = _setting(None, "hub data set of prompts, instead of `prompts`")
    dataset_split: str = _setting("train", "its split")
    caption_column: str = _setting("caption", "its column")

    # The run.
    output_dir: str = _setting("outputs/adapter", "where the adapter, checkpoints and samples go")
    overwrite: bool = _setting(False, "delete what is in output_dir")
    resume_from_checkpoint: str | None = _setting(
        None,
        "`latest`: the newest whole checkpoint, or the beginning where there is none yet; or one of them by its folder",
    )
    seed: int = _setting(0, "all randomness derives from it")
    max_train_steps: int = _setting(100, "optimiser steps")
    train_batch_size: int = _setting(8, "images a device and micro-batch")
    gradient_accumulation_steps: int = _setting(1, "micro-batches a step")
    checkpointing_steps: int = _setting(500, "steps between checkpoints")
    checkpoints_total_limit: int | None = _setting(2, "checkpoints kept")
    logging_dir: str = _setting("logs", "tracker logs, inside output_dir")
    report_to: str = _setting("tensorboard", "tracker of accelerate, or `none`")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _setting(
        None, "by default what accelerate is configured for"
    )
    gradient_checkpointing: bool = _setting(False, "trade time for memory")
    compile: Literal["no", "regional", "full"] = _setting("no", "compile the UNet's repeated blocks, or all of it")
    offload_text_encoders: bool = _setting(False, "keep them in the memory of the CPU")
    allow_tf32: bool = _setting(False, "TF32 matrix products on Ampere and newer")

    # The LoRA.
    rank: int = _setting(4, "rank of the LoRA")
    lora_alpha: int | None = _setting(None, "its alpha; by default the rank")
    lora_target_modules: list[str] = _setting(
        ["to_q", "to_k", "to_v", "to_out.0"], "names of the layers that get a LoRA; attention by default"
    )

    # Sampling while training.
    sample_num_steps: int = _setting(20, "denoising steps")
    sample_guidance_scale: float = _setting(5.0, "g of classifier-free guidance")
    guidance: Literal["shared", "full", "off"] = _setting("shared", "where the unconditional prediction comes from")
    variance: Literal["eta", "table", "learned"] = _setting("eta", "kind of variance schedule")
    sample_eta: float = _setting(1.0, "eta of the schedule, in (0, 1]; where a learned one starts")
    sample_etas: list[float] = _setting([], "table: one eta a step, noisiest first")
    variance_knots: int = _setting(5, "learned: number of knots over the time")
    resolution: int | None = _setting(None, "pixels; by default the base's own")
    skip_first_steps: int = _setting(0, "noisiest steps that are not learned from; SPO: 4 of 20")
    train_timestep_fraction: float = _setting(
        1.0, "share of the denoising steps that are learned from, drawn anew for each rollout"
    )

    timesteps_per_forward: int = _setting(
        1,
        "denoising steps of an image in one forward of the loss; from 2 on, base and policy share the rollout's "
        "forwards, too: faster where train_batch_size does not fill the device, for more memory",
    )

    # The optimiser.
    beta: float = _setting(
        0.01, "temperature of the KL to the base; DDPO takes 0 for none, and then leaves the base out"
    )
    log_prob_reduction: Literal["sum", "mean"] = _setting(
        "sum", "`sum` is the density; `mean` divides log-probs by their dimension, as DDPO's and SPO's code do"
    )
    learning_rate: float = _setting(1e-4, "initial rate")
    variance_learning_rate: float = _setting(1e-2, "rate of the learned variance offsets")
    lr_scheduler: str = _setting("constant", "diffusers' name of a schedule")
    lr_warmup_steps: int = _setting(0, "steps of warm-up")
    adam_beta1: float = _setting(0.9, "")
    adam_beta2: float = _setting(0.999, "")
    adam_weight_decay: float = _setting(1e-4, "")
    adam_epsilon: float = _setting(1e-8, "")
    max_grad_norm: float = _setting(1.0, "gradients are clipped to it")
    use_8bit_adam: bool = _setting(False, "AdamW of bitsandbytes, its state in 8 bits")

    # Health.
    nonfinite: Literal["stop", "skip"] = _setting(
        "stop", "what a reward, loss or gradient that is not finite leads to: an error, or it is left out and recorded"
    )
    max_kl: float | None = _setting(
        None, "nats an image: beyond it training stops, and the best checkpoint by held-out reward is the adapter"
    )
    load_best_model_at_end: bool = _setting(
        False, "the adapter is the best checkpoint by the reward of the validation images, not the last"
    )
    min_diversity: float = _setting(
        0.2, "share of the base's diversity below which it is reported as collapsed; 0: never"
    )

    # Looking at it.
    validation_prompts: list[str] = _setting([], "prompts of the samples; by default some of the training ones")
    validation_set: str = _setting("", "or a set or file of them, emoji-heldout for instance, as `prompts` takes it")
    num_validation_images: int = _setting(8, "sample images")
    validation_steps: int = _setting(0, "steps between sample images; 0: at the start and the end")

    def __post_init__(self) -> None:
        for name, word in (("guidance", "off"), ("mixed_precision", "no"), ("compile", "no")):
            if getattr(self, name) is False:  # what YAML makes of the bare word
                object.__setattr__(self, name, word)
        check_types(self)
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "rank", "sample_num_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("checkpointing_steps", "num_validation_images", "timesteps_per_forward"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.fit_reward != 1 and self.fit_reward >= 0, "fit_reward", self.fit_reward, "0, or 2 or more images")
        if self.fit_reward:
            fixed = (self.reward_shift, self.reward_scale)
            require(fixed == (0, 1), "reward_shift and reward_scale", fixed, "none beside fit_reward, which fits them")
        self.initial_shaping()
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
        for eta in self.sample_etas if self.variance == "table" else [self.sample_eta]:
            require(0 <= eta <= 1, "sample_eta", eta, "a number in (0, 1]")
            require(eta > 0, "sample_eta", eta, "above 0: a deterministic step has no log-prob to train with")
        self.initial_schedule()

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

    def initial_shaping(self) -> Shaping:
        """The reward's shaping as configured; with `fit_reward` it is fitted later."""
        return Shaping(shift=self.reward_shift, scale=self.reward_scale, clip=self.reward_clip)

    def initial_schedule(self) -> VarianceSchedule:
        """The variance schedule training starts from, which is also that of its reference."""
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

    pairs: str = _setting(
        "",
        "learn from preference pairs instead of rollouts (Diffusion-DPO, arXiv:2311.12908): a hub data set, a parquet "
        "file, or a folder",
    )
    image_columns: list[str] = _setting(["jpg_0", "jpg_1"], "of the pairs, as Pick-a-Pic calls them")
    label_column: str = _setting("label_0", "1 where the first is preferred, 0 where the second is; else a tie")
    pairs_shuffle_buffer: int = _setting(1000, "pairs among which the next is drawn")
    num_candidates: int = _setting(4, "candidates x_s drawn from each x_t; SPO: 4")
    margin: float = _setting(0.0, "a pair is dropped unless its rewards differ by more")
    label_smoothing: float = _setting(0.0, "share of flipped labels to assume")
    loss_type: Literal["sigmoid", "ipo"] = _setting("sigmoid", "as in trl's DPOConfig")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_candidates >= 2, "num_candidates", self.num_candidates, "2 or more")
        require(self.margin >= 0, "margin", self.margin, "0 or more")
        require(0 < self.beta < float("inf"), "beta", self.beta, "a positive number")
        require(len(self.image_columns) == 2, "image_columns", self.image_columns, "two names")
        require(self.pairs_shuffle_buffer >= 1, "pairs_shuffle_buffer", self.pairs_shuffle_buffer, "1 or more")
        if self.pairs:
            require(self.max_kl is None, "max_kl", self.max_kl, "none with pairs, of which no KL of steps is measured")
            require(self.variance != "learned", "variance", self.variance, "eta or table with pairs, which teach none")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "a number in [0, 0.5)")


@dataclass(frozen=True, kw_only=True)
class DDPOSettings(TrainSettings):
    """Policy gradient on denoising steps (DDPO, arXiv:2305.13301) with an exact per-step KL to the base."""

    num_generations: int = _setting(8, "images a prompt, over which advantages are normalised")
    per_prompt_stat_tracking: bool = _setting(True, "normalise per prompt; otherwise over the whole step")
    scale_rewards: bool = _setting(True, "divide advantages by their standard deviation")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = _setting(
        "sum_then_normalize",
        "of a weighted reward: advantages of the sum, or the weighted sum of each term's own (GDPO, arXiv:2601.05242)",
    )
    train_clip_range: float = _setting(0.2, "the ratio is clipped to 1 ± this")
    train_adv_clip_max: float = _setting(5.0, "advantages are clipped to ± this; DDPO: 5")
    num_inner_epochs: int = _setting(1, "optimiser steps a rollout")

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
        if self.per_prompt_stat_tracking:
            require(self.num_generations >= 2, "num_generations", self.num_generations, "2 or more per prompt")
        if self.multi_objective_aggregation == "normalize_then_sum":
            wanted = "a weighted: sum, for multi_objective_aggregation normalize_then_sum"
            require(self.reward.startswith("weighted:"), "reward", self.reward, wanted)
            shaping = (self.reward_shift, self.reward_scale, self.reward_clip)
            none = "none of them with normalize_then_sum, which normalises each term by itself"
            require(shaping == (0, 1, []), "reward_shift, reward_scale and reward_clip", shaping, none)


S = TypeVar("S", bound=TrainSettings)


def parse_settings(settings: type[S], arguments: Sequence[str], description: str) -> S:
    """Settings from `--config FILE.yaml` and flags, which win (trl's `TrlParser`).

    Raises:
        ValueError: for an unknown key, naming the nearest one, a missing or malformed file, or a value out of range.
    """
    from trl import TrlParser

    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    values: dict[str, Any] = {}
    if "--config" in arguments:
        index = arguments.index("--config")
        place = arguments[index + 1 :][:1]
        values = read_settings(Path(place[0] if place else "(none given)"), settings, besides=("env",))
        arguments = arguments[:index] + arguments[index + 2 :]
    known = {f"--{f.name}" for f in dataclasses.fields(settings)} | {"--config", "--help"}
    known |= {f"--no_{f.name}" for f in dataclasses.fields(settings)}
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag.replace("-", "_").replace("__", "--", 1) not in known:
            raise ValueError(f"unknown flag {flag}{nearest(flag, sorted(known))}")
    parser = TrlParser(settings, description=description, allow_abbrev=False)
    # As parse_args_and_config does, which reads the file in the locale's encoding and 1e-5 as a text.
    variables = values.pop("env", None) or {}
    require(isinstance(variables, dict), "env", variables, "a mapping of variables of the environment")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    parser.set_defaults_with_config(**values)
    (parsed,) = parser.parse_args_and_config(arguments)
    return parsed
