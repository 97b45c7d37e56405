"""Settings of training: YAML by `--config`, any field as a flag. Importing this module does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from stepfuse.data.settings_fields import check_settings, setting
from stepfuse.data.settings_file import require
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.train.joint_settings import JointSettings, separate_objectives
from stepfuse.train.policy_settings import (
    HealthSettings,
    LoRASettings,
    OptimiserSettings,
    SamplingSettings,
    ValidationSettings,
    VarianceSettings,
)
from stepfuse.train.run_settings import BaseModelSettings, OutputSettings, PromptSettings, RewardSettings


# The fields of the last base come first.
@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    ValidationSettings,
    HealthSettings,
    OptimiserSettings,
    SamplingSettings,
    VarianceSettings,
    LoRASettings,
    OutputSettings,
    PromptSettings,
    JointSettings,
    RewardSettings,
    BaseModelSettings,
):
    """Settings that DPO and DDPO share. Names follow diffusers' LoRA scripts and trl.

    The first lines of the classes' docstrings are the headings of `--help`, and the attributes are its texts.
    """

    program: ClassVar[str] = ""  # in train/, and the folder of its packaged configurations
    description: ClassVar[str] = ""  # for `--help`
    example: ClassVar[str] = ""  # one of them
    memory_settings: ClassVar[Mapping[str, str]] = {}  # settings of the algorithm that need memory, and why
    fixed: ClassVar[frozenset[str]] = frozenset()  # settings that are no flags, since others decide them
    positional: ClassVar[str] = ""  # a setting that may be the first argument, without its flag

    each: ClassVar[tuple["TrainSettings", ...]]  # the settings of every objective; those of the run if it has one

    def __post_init__(self) -> None:
        for name, word in (("guidance", "off"), ("mixed_precision", "no"), ("compile", "no")):
            if getattr(self, name) is False:  # YAML 1.1 reads the word as a boolean
                object.__setattr__(self, name, word)
        check_settings(self)
        object.__setattr__(self, "each", separate_objectives(self))
        self.initial_schedule()  # checks its options; last, since it imports torch

    @property
    def algorithm(self) -> str:
        """Name of the training algorithm."""
        return self.program

    def check_trained_variance(self, trained: bool) -> None:
        """Raise ValueError for a variance schedule that is trained, if `trained`, and that this algorithm cannot."""

    @property
    def title(self) -> str:
        """The names of all objectives, for messages."""
        return ", ".join(each.name for each in self.each)


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Preference pairs of a data set (Diffusion-DPO).

    Attributes:
        pairs: Train on the preference pairs of a data set instead of rollouts (arXiv:2311.12908): a hub data set, a
            parquet file, or a folder.
        image_columns: Columns of the two images of a pair.
        label_column: Column of the preference: 1 if the first image is preferred, 0 if the second is. Other values are
            ties, which are dropped.
        pairs_shuffle_buffer: Size of the shuffle buffer: the number of pairs that the next one is chosen from.
    """

    pairs: str = ""
    image_columns: list[str] = setting(["jpg_0", "jpg_1"])
    label_column: str = "label_0"
    pairs_shuffle_buffer: int = setting(1000, least=1)

    def check_together(self) -> None:
        require(len(self.image_columns) == 2, "image_columns", self.image_columns, "two names")


@dataclass(frozen=True, kw_only=True)
class DPOSettings(PairSettings, TrainSettings):
    """DPO: candidates of one step, the best against the worst (MSDDA; SPO, arXiv:2406.04314).

    Attributes:
        num_candidates: Number of candidates x_s that are sampled from every x_t; the best and the worst form a pair.
            SPO: 4.
        margin: A pair is dropped unless its rewards differ by more than this.
        label_smoothing: Assumed probability that a preference is flipped, in [0, 0.5); as in trl's DPOConfig.
        loss_type: Loss on the difference of log-ratios: DPO's `sigmoid` or `ipo`; as in trl's DPOConfig.
        train_clip_range: Clamp the probability ratio to the base model, of winner and loser each, to 1 ± this; a
            clamped ratio has no gradient. SPO's eps: 0.1, with log_prob_reduction mean. 0 does not clamp.
    """

    program: ClassVar[str] = "dpo"
    description: ClassVar[str] = "Train one LoRA by step-level DPO, to increase one reward."
    example: ClassVar[str] = "dpo/emoji-alignment"
    memory_settings: ClassVar[Mapping[str, str]] = {"num_candidates": "of every image together"}

    beta: float = setting(0.01, above=0)
    num_candidates: int = setting(4, least=2)
    margin: float = setting(0.0, least=0, finite=False)
    label_smoothing: float = setting(0.0, least=0, below=0.5)
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    train_clip_range: float = setting(0.0, least=0, below=1)

    @property
    def algorithm(self) -> str:
        return "diffusion-dpo" if self.pairs else "dpo"

    def check_together(self) -> None:
        if self.objectives:
            require(not self.pairs, "pairs", self.pairs, "none with objectives, of which a data set has no preferences")
            whole = "0 with objectives, whose rewards are normalised among the candidates"
            require(self.margin == 0, "margin", self.margin, whole)
        if self.pairs:
            require(self.max_kl is None, "max_kl", self.max_kl, "none with pairs, of which no KL of steps is measured")
            self.check_trained_variance(self.trains_variance)
            clip = self.train_clip_range
            require(clip == 0, "train_clip_range", clip, "0 with pairs: Diffusion-DPO's loss has no clamp")

    def check_trained_variance(self, trained: bool) -> None:
        if self.pairs:
            require(not trained, "variance", self.variance, "one that is not trained, with pairs")


@dataclass(frozen=True, kw_only=True)
class DDPOSettings(TrainSettings):
    """DDPO: policy gradient on denoising steps (arXiv:2305.13301) with an exact per-step KL to the base.

    Attributes:
        num_generations: Number of images per prompt in an optimiser step: a group.
        per_prompt_stat_tracking: Normalise advantages per prompt, by the mean and standard deviation of the rewards of
            its group in this step; otherwise over all images of the step. ddpo-pytorch's setting of this name keeps a
            buffer of earlier rewards: see the next two.
        per_prompt_stat_tracking_buffer_size: Number of rewards to remember per prompt over the steps, with which its
            advantages are normalised, as ddpo-pytorch and trl do (16 there). 0 remembers none: statistics are those of
            this step's group.
        per_prompt_stat_tracking_min_count: Number of remembered rewards below which a prompt's advantages are
            normalised over all images of the step, as in ddpo-pytorch and trl (16 there).
        scale_rewards: Divide advantages by the standard deviation; otherwise only the mean is subtracted.
        multi_objective_aggregation: For a `weighted:` reward: normalise the weighted sum, or normalise each term and
            then sum (GDPO, arXiv:2601.05242).
        train_clip_range: Clip the probability ratio to the policy of the rollout to 1 ± this (PPO); ddpo-pytorch: 1e-4.
        train_adv_clip_max: Clip advantages to ± this; ddpo-pytorch: 5.
        num_inner_epochs: Number of optimiser steps on each rollout.
    """

    program: ClassVar[str] = "ddpo"
    description: ClassVar[str] = "Train one LoRA by DDPO, to increase one reward."
    example: ClassVar[str] = "ddpo/emoji-compressibility"

    num_generations: int = setting(8, least=1)
    per_prompt_stat_tracking: bool = True
    per_prompt_stat_tracking_buffer_size: int = setting(0, least=0)
    per_prompt_stat_tracking_min_count: int = setting(0, least=0)
    scale_rewards: bool = True
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    train_clip_range: float = setting(0.2, above=0, finite=False)
    train_adv_clip_max: float = setting(5.0, above=0, finite=False)
    num_inner_epochs: int = setting(1, least=1)

    def check_together(self) -> None:
        if self.objectives:
            self._check_joint()
            return
        self.check_trained_variance(self.trains_variance)
        sums = self.multi_objective_aggregation == "sum_then_normalize"
        if not sums:
            wanted = "a weighted: sum, for multi_objective_aggregation normalize_then_sum"
            require(parse_reward(self.reward).kind == "sum", "reward", self.reward, wanted)
            shaping = (self.reward_shift, self.reward_scale, self.reward_clip)
            none = "none of them with normalize_then_sum, which normalises each term by itself"
            require(shaping == (0, 1, []), "reward_shift, reward_scale and reward_clip", shaping, none)
        buffer, size = "per_prompt_stat_tracking_buffer_size", self.per_prompt_stat_tracking_buffer_size
        least = self.per_prompt_stat_tracking_min_count
        most = f"0 or more, and no more than {buffer} ({size})"
        require(least <= size, "per_prompt_stat_tracking_min_count", least, most)
        if size:
            require(self.per_prompt_stat_tracking, buffer, size, "0 without per_prompt_stat_tracking")
            require(sums, buffer, size, "0 with multi_objective_aggregation normalize_then_sum")
        elif self.per_prompt_stat_tracking:
            require(self.num_generations >= 2, "num_generations", self.num_generations, "2 or more per prompt")

    def _check_joint(self) -> None:
        """Each reward is normalised in its group, then weighted: nothing else has a meaning at other weights."""
        tracking, buffer = self.per_prompt_stat_tracking, self.per_prompt_stat_tracking_buffer_size
        require(tracking, "per_prompt_stat_tracking", tracking, "on with objectives: weights differ between prompts")
        require(buffer == 0, "per_prompt_stat_tracking_buffer_size", buffer, "0 with objectives, whose weights change")
        aggregation, default = self.multi_objective_aggregation, "sum_then_normalize"
        unset = "unset with objectives, each of which is normalised by itself"
        require(aggregation == default, "multi_objective_aggregation", aggregation, unset)
        require(self.num_generations >= 2, "num_generations", self.num_generations, "2 or more per prompt")

    def check_trained_variance(self, trained: bool) -> None:
        if not self.beta:
            needed = "a positive number beside max_kl or a variance that is trained, which need the base"
            require(self.max_kl is None and not trained, "beta", self.beta, needed)


SETTINGS: dict[str, type[TrainSettings]] = {"dpo": DPOSettings, "ddpo": DDPOSettings}  # of train/dpo.py, train/ddpo.py
