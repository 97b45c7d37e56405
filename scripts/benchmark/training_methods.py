"""Methods of taking one optimiser step that the benchmark of training compares."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepfuse.data.prompts import load_prompts
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.benchmark import memory
from stepfuse.scripts.benchmark.harness import Method
from stepfuse.scripts.benchmark.models import random_pipeline, with_copied_network
from stepfuse.scripts.benchmark.settings import TrainingBenchmark
from stepfuse.train.algorithms import ALGORITHMS
from stepfuse.train.checkpoints import Progress
from stepfuse.train.health import Health
from stepfuse.train.launch import make_accelerator
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DDPOSettings, DPOSettings, TrainSettings
from stepfuse.train.setup import Setup
from stepfuse.train.update import Update

OURS = "stepfuse"
PRECISIONS: dict[str, Any] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
PROMPTS = "emoji"
REWARD = "colourfulness"  # cheap, and hardly ever the same for two images: SPO leaves ties out


@dataclass(frozen=True)
class Row:
    """A row of the table: a method of taking an optimiser step."""

    algorithm: str
    method: str
    fraction: float = 1.0  # of the denoising steps, which are learned from
    compile: str = "no"
    kl: bool = True  # whether the loss of stepfuse's DDPO has a KL to the base; ddpo-pytorch's has none
    together: int = 1  # denoising steps in one forward pass of the loss, of stepfuse

    @property
    def name(self) -> str:
        more = [] if self.kl else ["no KL"]
        more += [f"{self.fraction:g} of the steps"] if self.fraction < 1 else []
        more += [f"{self.together} steps a forward"] if self.together > 1 else []
        more += [f"{self.compile} compile"] if self.compile != "no" else []
        return ", ".join([self.method, *more])

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.name}"


def base_pipeline(settings: TrainingBenchmark) -> DiffusionPipeline:
    """The base model on its device: the embedded one, or one of random weights."""
    dtype = getattr(torch, settings.dtype)
    if settings.model == "emoji":
        return load_pipeline("emoji", dtype=dtype).to(settings.device)
    return random_pipeline(settings.model, layers=settings.layers, dtype=dtype, device=settings.device)


def method_of(row: Row, settings: TrainingBenchmark, base: DiffusionPipeline) -> Method:
    """A row's method; it trains a network that shares the frozen weights of the base model."""
    build = _stepfuse if row.method == OURS else _baseline
    return build(row, settings, with_copied_network(base))


def _stepfuse(row: Row, settings: TrainingBenchmark, pipeline: DiffusionPipeline) -> Method:
    """The loop of `train/loop.py`: what it does from one optimiser step to the next."""
    backbone = backbone_of(pipeline)
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
        lora_target_modules=list(backbone.targets),
        log_prob_reduction="mean",  # as the baselines'
    )
    training: TrainSettings
    if row.algorithm == "ddpo":
        compared = settings.images > 1  # one image has no group
        beta = DDPOSettings.beta if row.kl else 0.0
        training = DDPOSettings(**common, num_generations=settings.images, per_prompt_stat_tracking=compared, beta=beta)
    else:
        skipped = settings.skip_first_steps
        training = DPOSettings(**common, num_candidates=settings.candidates, skip_first_steps=skipped)
    algorithm = ALGORITHMS[training.algorithm](training)
    accelerator = make_accelerator(training)
    reward, progress = TrainingReward(training, accelerator.device), Progress()
    setup = Setup(training, accelerator, reward, load_prompts(PROMPTS), pipeline)
    health = Health(progress, skips=False, main=True)
    source = algorithm.source(setup, progress, health)
    update = Update(setup=setup, algorithm=algorithm, health=health)

    def step() -> None:
        batches, _ = source(progress.step)
        update(batches, progress.step + 1)
        progress.step += 1

    return Method(run=step, networks=() if row.compile != "no" else (backbone.network,), close=reward.close)


def _baseline(row: Row, settings: TrainingBenchmark, pipeline: DiffusionPipeline) -> Method:
    """ddpo-pytorch, Flow-GRPO or SPO on the same task, with the same optimiser and LoRA."""
    from stepfuse.scripts.baselines.ddpo_pytorch import DDPOPyTorch
    from stepfuse.scripts.baselines.flow_grpo import FlowGRPO
    from stepfuse.scripts.baselines.spo import SPO
    from stepfuse.scripts.baselines.training import Loop, Task

    accelerator = make_accelerator(DDPOSettings(report_to="none", mixed_precision=PRECISIONS[settings.dtype]))
    task = Task(
        pipeline=pipeline,
        accelerator=accelerator,
        reward=load_reward(REWARD, accelerator.device),
        prompts=load_prompts(PROMPTS),
        targets=backbone_of(pipeline).targets,
        images=settings.images,
        steps=settings.steps,
        resolution=settings.resolution,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    loop: Loop
    if row.algorithm == "ddpo":
        kind = {"ddpo-pytorch": DDPOPyTorch, "Flow-GRPO": FlowGRPO}[row.method]
        loop = kind(task, timestep_fraction=row.fraction)
    else:
        memory.check_copies(pipeline.unet, 1, accelerator.device)
        loop = SPO(task, candidates=settings.candidates, skip_first_steps=settings.skip_first_steps)
    return Method(run=loop.step, networks=loop.networks)
