"""Settings of a run: base model, reward, prompts, and where it writes. Importing this does not import torch."""

from dataclasses import dataclass
from typing import Literal

from stepfuse.data.names import nearest
from stepfuse.data.prompts import load_prompts
from stepfuse.data.seeds import LIMIT
from stepfuse.data.settings_fields import setting
from stepfuse.data.settings_file import require
from stepfuse.rewards.reward_name import parse_reward

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


@dataclass(frozen=True, kw_only=True)
class BaseModelSettings:
    """Base model.

    Attributes:
        pretrained_model_name_or_path: Base model: a hub id, the folder of a diffusers pipeline, or a bundled base
            model, `emoji` or `emoji-flow`.
        revision: Revision of the base model on the hub: a branch, tag or commit.
        variant: Variant of the base model's weight files, for example `fp16`.
        max_sequence_length: Tokens of a prompt for base models that pad prompts to a fixed length, as diffusers'
            pipelines take it. Unset, what the base model states, or its pipeline's default.
        mixed_precision: Precision of the base model; LoRA weights and log-probabilities are float32. Unset, the
            precision that accelerate is configured with.
    """

    pretrained_model_name_or_path: str = "emoji"
    revision: str | None = None
    variant: str | None = None
    max_sequence_length: int | None = setting(None, least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Objective and reward.

    Attributes:
        reward: Reward to increase: a name from `stepfuse reward list`, path/to/file.py:function, path/to/file.yaml,
            http://HOST:PORT, or `weighted:` and a sum such as 0.5*compressibility/0.2 + 0.5*clip_score/6.
        reward_shift: Number that is subtracted from the reward.
        reward_scale: Number that the shifted reward is divided by. It sets the unit of beta, margin and reward_clip;
            normalised advantages do not depend on it.
        reward_clip: Lower and upper bound that the shifted and scaled reward is clipped to. Unset, no clipping.
        fit_reward: Number of images of the base model on which reward_shift and reward_scale are fitted, to mean 0 and
            standard deviation 1, before training. 0 does not fit them.
        async_scoring: Compute the rewards of one micro-batch while the next one is sampled.
        reward_dtype: Precision of the networks of rewards; scores are float32. Rewards without networks are computed as
            before; for workers, servers and functions of your own it is an error.
        objective_name: Name of the objective in adapter sets and in weights. Unset, the name of the reward.
    """

    reward: str = "clip_score"
    reward_shift: float = 0.0
    reward_scale: float = setting(1.0, above=0)
    reward_clip: list[float] = setting([], finite=False, expected="two numbers, the lower first")
    fit_reward: int = setting(0, least=0)
    async_scoring: bool = True
    reward_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    objective_name: str = ""

    def check_together(self) -> None:
        require(self.fit_reward != 1, "fit_reward", self.fit_reward, "0, or 2 or more images")
        fixed = (self.reward_shift, self.reward_scale)
        fits = not self.fit_reward or fixed == (0, 1)
        require(fits, "reward_shift and reward_scale", fixed, "none beside fit_reward, which fits them")
        bounds = self.reward_clip
        ordered = len(bounds) == 2 and bounds[0] < bounds[1]
        require(not bounds or ordered, "reward_clip", bounds, "two numbers, the lower first")

    @property
    def name(self) -> str:
        """The objective's name: as given, or by default from the reward."""
        return self.objective_name or parse_reward(self.reward).objective


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Prompts.

    Attributes:
        prompts: Training prompts: a text file with one prompt per line, or one of the sets emoji, colours, dpok,
            quoted-words, partiprompts, pick-a-pic and unigenbench. SET:COUNT takes COUNT of its prompts, evenly spaced.
        dataset_name: Hub data set that the training prompts are taken from, instead of `prompts`.
        dataset_split: Split of the data set.
        caption_column: Column of the data set that holds the prompts.
    """

    prompts: str = "emoji"
    dataset_name: str | None = None
    dataset_split: str = "train"
    caption_column: str = "caption"

    def load_prompts(self, seed: int) -> list[str]:
        """Load the prompts, as `stepfuse.data.prompts.load_prompts` does; the seed draws among several captions."""
        return load_prompts(
            self.prompts,
            dataset_name=self.dataset_name,
            split=self.dataset_split,
            column=self.caption_column,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Run.

    Attributes:
        output_dir: Folder that the adapter, checkpoints, sample images and logs are written to.
        overwrite: Delete the files of an earlier run in output_dir once the new run has started. Files that were not
            written by training stay.
        resume_from_checkpoint: Checkpoint to resume from: a folder such as checkpoint-500, or `latest` for the newest
            intact one in output_dir, or from the start if there is none.
        seed: Seed of all random numbers.
        max_train_steps: Number of optimiser steps.
        train_batch_size: Images per process in a micro-batch. An optimiser step has train_batch_size ×
            gradient_accumulation_steps × processes images.
        gradient_accumulation_steps: Micro-batches per optimiser step.
        decode_batch_size: Largest number of images that the autoencoder decodes or encodes at once. Unset, as many as
            fit into a share of the memory.
        checkpointing_steps: Optimiser steps between two checkpoints.
        checkpoints_total_limit: Number of checkpoints to keep; the oldest is deleted. `none` keeps all.
        logging_dir: Folder of the trackers' logs, inside output_dir.
        report_to: Experiment trackers, separated by commas: aim, clearml, comet_ml, dvclive, mlflow, swanlab,
            tensorboard, trackio, wandb; `all` for those that are installed, or `none`.
        gradient_checkpointing: Recompute activations in the backward pass, which takes less memory and more time.
        compile: Compile the network's repeated blocks (`regional`) or all of it (`full`) with torch.compile.
        offload_text_encoders: Keep the text encoders in CPU memory and encode the prompts there.
        allow_tf32: Use TF32 for float32 matrix products on Ampere and newer GPUs.
    """

    output_dir: str = "outputs/adapter"
    overwrite: bool = False
    resume_from_checkpoint: str | None = None
    seed: int = setting(0, least=0, below=LIMIT, expected="an integer from 0 to 2^64 - 1")
    max_train_steps: int = setting(100, least=1)
    train_batch_size: int = setting(8, least=1)
    gradient_accumulation_steps: int = setting(1, least=1)
    decode_batch_size: int | None = setting(None, least=1)
    checkpointing_steps: int = setting(500, least=1)
    checkpoints_total_limit: int | None = setting(2, least=1, expected="1 or more, or none")
    logging_dir: str = "logs"
    report_to: str = "tensorboard"
    gradient_checkpointing: bool = False
    compile: Literal["no", "regional", "full"] = "no"
    offload_text_encoders: bool = False
    allow_tf32: bool = False

    def check_together(self) -> None:
        known = (*TRACKERS, "all")
        for tracker in self.trackers:
            expected = f"`none`, or any of {', '.join(known)}{nearest(tracker, (*known, 'none'))}"
            require(tracker in known, "report_to", tracker, expected)

    @property
    def trackers(self) -> list[str]:
        """Names in `report_to`; empty for `none`."""
        names = [name.strip() for name in self.report_to.split(",") if name.strip()]
        return [] if names == ["none"] else names
