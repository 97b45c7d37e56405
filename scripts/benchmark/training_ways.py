"""The ways to take one optimiser step that the benchmark of training has, each ready to run on one model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepfuse.data.names import nearest
from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.benchmark.ddpo_pytorch import DDPOPyTorch
from stepfuse.scripts.benchmark.loops import Loop, Task
from stepfuse.scripts.benchmark.models import ARCHITECTURES, ATTENTION
from stepfuse.scripts.benchmark.pipelines import random_pipeline
from stepfuse.scripts.benchmark.spo import SPO
from stepfuse.train.algorithms import DDPO, DPO
from stepfuse.train.health import Health
from stepfuse.train.launch import make_accelerator
from stepfuse.train.loop import Run
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DDPOSettings, DPOSettings

OURS = "stepfuse"
RIVALS = {"ddpo": "ddpo-pytorch", "dpo": "SPO"}
MODELS = ("emoji", *ARCHITECTURES)
PRECISIONS: dict[str, Any] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
PROMPTS = "emoji"
REWARD = "colourfulness"  # cheap, and hardly ever the same for two images: SPO leaves ties out


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """What is measured.

    Attributes:
        model: `emoji`, or `sd15` or `sdxl` with random weights.
        algorithms: `ddpo`, against ddpo-pytorch, and `dpo`, against SPO.
        images: of an optimiser step, all in one micro-batch.
        steps: denoising steps; a fifth of them, the first, have no candidates (SPO: 4 of 20).
        candidates: of dpo.
        repeats: rounds, of which the median counts, after one that warms up.
        resolution: pixels; by default the model's own.
        timesteps_per_forward: above 1 further rows of ours, with so many denoising steps in one forward of the loss.
        timestep_fraction: below 1 a further row of ours, and of ddpo-pytorch, that learns from this share of the steps.
        compile: `regional` or `full` for a further row of ours; all others are eager.
        gradient_checkpointing: of all ways.
        dtype: of the frozen weights and of autocast; LoRAs are in float32.
        threads: of the CPU; by default as many as torch takes.
        memory: measure each row's memory too, but compiled ones', in a process of its own.

    Raises:
        ValueError: for numbers below 1, and names that are not there.
    """

    model: str = "emoji"
    algorithms: tuple[str, ...] = tuple(RIVALS)
    images: int = 8
    steps: int = 20
    candidates: int = 4
    repeats: int = 3
    resolution: int | None = None
    timestep_fraction: float = 1.0
    timesteps_per_forward: int = 1
    compile: str = "no"
    gradient_checkpointing: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        named = (("model", MODELS), ("compile", ("no", "regional", "full")), ("dtype", tuple(PRECISIONS)))
        for name, known in (*named, ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"{name} {given!r}; expected one of {', '.join(known)}{nearest(given, known)}")
        if not self.algorithms or (strange := [name for name in self.algorithms if name not in RIVALS]):
            found = repr(strange[0]) if self.algorithms else "none"
            raise ValueError(
                f"algorithms: {found}; expected some of {', '.join(RIVALS)}"
                f"{nearest(strange[0], RIVALS) if self.algorithms else ''}"
            )
        bounds = (("images", 1), ("steps", 1), ("candidates", 2), ("repeats", 1), ("threads", 1))
        for name, least in (*bounds, ("timesteps_per_forward", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value}; expected {least} or more")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction {self.timestep_fraction}; expected a number in (0, 1]")
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError("dtype 'float16' on the CPU, which cannot train in it; expected float32 or bfloat16")

    @property
    def skip_first_steps(self) -> int:
        """Steps of dpo without candidates."""
        return self.steps // 5


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
        rows += [Row(algorithm, RIVALS[algorithm]), Row(algorithm, OURS)]
        if algorithm == "ddpo":
            rows.append(Row(algorithm, OURS, kl=False))
        if (together := settings.timesteps_per_forward) > 1:
            rows += [replace(row, together=together) for row in rows if row.algorithm == algorithm and row.way == OURS]
        if settings.timestep_fraction < 1:
            ways = (RIVALS["ddpo"], OURS) if algorithm == "ddpo" else (OURS,)  # SPO has no such setting
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
