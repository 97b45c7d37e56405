"""The ways to take one optimiser step that the benchmark of training has, each ready to run on one model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.benchmark.ddpo_pytorch import DDPOPyTorch
from stepfuse.scripts.benchmark.loops import Loop, Task
from stepfuse.scripts.benchmark.models import ATTENTION
from stepfuse.scripts.benchmark.pipelines import random_pipeline
from stepfuse.scripts.benchmark.settings import REFERENCES, TrainingBenchmark
from stepfuse.scripts.benchmark.spo import SPO
from stepfuse.train.algorithms import DDPO, DPO
from stepfuse.train.health import Health
from stepfuse.train.launch import make_accelerator
from stepfuse.train.loop import Run
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DDPOSettings, DPOSettings

OURS = "stepfuse"
PRECISIONS: dict[str, Any] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
PROMPTS = "emoji"
REWARD = "colourfulness"  # cheap, and hardly ever the same for two images: SPO leaves ties out


@dataclass(frozen=True)
class Row:
    """A row of the table: a way to take an optimiser step.

    Attributes:
        fraction: share of the denoising steps that are learned from.
        compile: `no`, `regional` or `full`.
        kl: of ours, whether the loss of DDPO has a KL to the base; ddpo-pytorch's has none.
        together: of ours, denoising steps in one forward of the loss.
    """

    algorithm: str
    way: str
    fraction: float = 1.0
    compile: str = "no"
    kl: bool = True
    together: int = 1

    @property
    def name(self) -> str:
        """The way with what is special about it."""
        more = [] if self.kl else ["no KL"]
        more += [f"{self.fraction:g} of the steps"] if self.fraction < 1 else []
        more += [f"{self.together} steps a forward"] if self.together > 1 else []
        more += [f"{self.compile} compile"] if self.compile != "no" else []
        return ", ".join([self.way, *more])

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.name}"


def rows_of(settings: TrainingBenchmark) -> list[Row]:
    """The rival, then ours, of each algorithm."""
    rows = []
    for algorithm in settings.algorithms:
        rows += [Row(algorithm, REFERENCES[algorithm]), Row(algorithm, OURS)]
        if algorithm == "ddpo":
            rows.append(Row(algorithm, OURS, kl=False))
        if (together := settings.timesteps_per_forward) > 1:
            rows += [replace(row, together=together) for row in rows if row.algorithm == algorithm and row.way == OURS]
        if settings.timestep_fraction < 1:
            ways = (REFERENCES["ddpo"], OURS) if algorithm == "ddpo" else (OURS,)  # SPO has no such setting
            rows += [
                Row(algorithm, way, fraction=settings.timestep_fraction, together=together if way == OURS else 1)
                for way in ways
            ]
        if settings.compile != "no":
            rows.append(Row(algorithm, OURS, compile=settings.compile))
    return rows


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way, ready to run.

    Attributes:
        step: all the work of one optimiser step.
        networks: the UNets it runs.
        close: ends its threads.
    """

    step: Callable[[], None]
    networks: tuple[nn.Module, ...]
    close: Callable[[], None]


def base_pipeline(settings: TrainingBenchmark) -> DiffusionPipeline:
    """The base on its device: the embedded one, or one of random weights."""
    dtype = getattr(torch, settings.dtype)
    if settings.model == "emoji":
        return load_pipeline("emoji", dtype=dtype).to(settings.device)
    return random_pipeline(settings.model, dtype=dtype, device=settings.device)


def way_of(row: Row, settings: TrainingBenchmark, pipeline: DiffusionPipeline) -> Way:
    """A row's way; the pipeline's UNet becomes what it trains."""
    return ours(row, settings, pipeline) if row.way == OURS else rival(row, settings, pipeline)


def ours(row: Row, settings: TrainingBenchmark, pipeline: DiffusionPipeline) -> Way:
    """The loop of `train/loop.py` itself: what it does from one optimiser step to the next."""
    common: dict[str, Any] = dict(
        pretrained_model_name_or_path=settings.model,
        reward=REWARD,
        report_to="none",
        mixed_precision=PRECISIONS[settings.dtype],
        train_batch_size=settings.images,
        sample_num_steps=settings.steps,
        resolution=settings.resolution,
        train_timestep_fraction=row.fraction,
        timesteps_per_forward=row.together,
        compile=row.compile,
        gradient_checkpointing=settings.gradient_checkpointing,
        lora_target_modules=list(ATTENTION),
        log_prob_reduction="mean",  # as the rivals'
    )
    algorithm: DDPO | DPO
    if row.algorithm == "ddpo":
        compared = settings.images > 1  # one image has no group
        beta = DDPOSettings.beta if row.kl else 0.0
        ddpo = DDPOSettings(**common, num_generations=settings.images, per_prompt_stat_tracking=compared, beta=beta)
        algorithm = DDPO(ddpo)
    else:
        skipped = settings.skip_first_steps
        algorithm = DPO(DPOSettings(**common, num_candidates=settings.candidates, skip_first_steps=skipped))
    training = algorithm.settings
    accelerator = make_accelerator(training)
    reward = TrainingReward(load_reward(REWARD, accelerator.device), training, accelerator.device)
    run = Run(training, algorithm, accelerator, reward, load_prompts(PROMPTS), pipeline)
    run.health = Health(run.progress, skips=False, main=True)
    rollouts, update = run.rollouts(), run.update()

    def step() -> None:
        batches, _ = rollouts.collect(run.progress.step, run.current_schedule())
        update(batches, run.progress.step + 1)
        run.progress.step += 1

    return Way(step=step, networks=(pipeline.unet,), close=reward.close)


def rival(row: Row, settings: TrainingBenchmark, pipeline: DiffusionPipeline) -> Way:
    """ddpo-pytorch or SPO on the same task, with the same optimiser and LoRA."""
    training = DDPOSettings(report_to="none", mixed_precision=PRECISIONS[settings.dtype])
    accelerator = make_accelerator(training)
    task = Task(
        pipeline=pipeline,
        accelerator=accelerator,
        reward=load_reward(REWARD, accelerator.device),
        prompts=load_prompts(PROMPTS),
        images=settings.images,
        steps=settings.steps,
        resolution=settings.resolution,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    loop: Loop
    if row.algorithm == "ddpo":
        loop = DDPOPyTorch(task, timestep_fraction=row.fraction)
    else:
        loop = SPO(task, candidates=settings.candidates, skip_first_steps=settings.skip_first_steps)
    return Way(step=loop.step, networks=loop.networks, close=loop.close)
