"""What is sampled and trained on the pretended device: a set that every rule can sample, and small runs."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule
from stepfuse.fuse.rules.gap_profile import GapProfile
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.algorithms import ALGORITHMS
from stepfuse.train.checkpoints import Progress
from stepfuse.train.health import Health
from stepfuse.train.launch import make_accelerator
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DDPOSettings, DPOSettings, TrainSettings
from stepfuse.train.setup import Setup
from stepfuse.train.update import Update
from tests.fixtures_tiny import save_adapter, save_stable_diffusion
from tests.fixtures_training import COMMON, forget_accelerator, save_tiny_pipeline
from tests.pretended.waits import Waits, counted

PROMPTS = ["a red apple on a blue background", "a fox on a green background"]
OBJECTIVES = {
    "a": (EtaSchedule(eta=0.8), "compressibility"),
    "b": (TableSchedule(etas=(1.0, 0.8, 0.6)), "colourfulness"),
    "c": (LearnedSchedule(offsets=torch.tensor([0.1, 0.0, -0.2])), "emoji_background"),
}
SCALES = {"a": 1.0, "b": 5.0, "c": 10.0}
MIXTURE = "weighted:1*colourfulness/5 + 1*compressibility/1"


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a rule is sampled.

    Attributes:
        rule: its name.
        options: of the rule.
        weights, strength: as `FusedSampler.sample` takes them.
    """

    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=lambda: {"a": 0.5, "b": 0.3, "c": 0.2})
    strength: float = 1.0


RULES = {
    "base": Case(rule="base"),
    "product": Case(rule="product"),
    "product, gate": Case(rule="product", options={"gate": 1.0}),
    "product, merged": Case(rule="product", options={"gate": float("inf")}),
    "average_noise": Case(rule="average_noise"),
    "kl": Case(rule="kl", weights={"a": 1.0}, strength=1.2),
    "switch": Case(rule="switch"),
    "systematic": Case(rule="systematic"),
    "soup": Case(rule="soup"),
    "soup_factors": Case(rule="soup_factors"),
    "oracle": Case(rule="oracle", weights={"a": 0.5, "b": 0.5}),
    "code": Case(rule="code", options={"candidates": 3, "block_size": 2}),
    "rgg": Case(rule="rgg", weights={"b": 0.5, "c": 0.5}),
}


def save_world(root: Path) -> Path:
    """A set of three objectives, whose schedules and rewards are of three kinds, and of an oracle."""
    base = save_stable_diffusion(root / "base")
    for seed, (name, (variance, reward)) in enumerate(OBJECTIVES.items()):
        save_adapter(root / name, base, name, seed=seed, variance=variance, reward=reward)
    save_adapter(root / "mix", base, "mix", seed=3, variance=EtaSchedule(eta=0.7), reward=MIXTURE)
    create_set(
        root / "set",
        [root / name for name in OBJECTIVES],
        oracles=[root / "mix"],
        base_schedule=EtaSchedule(eta=0.9),
    )
    return root / "set"


def load_sampler(folder: Path, device: str, **options: Any) -> FusedSampler:
    return FusedSampler.from_pretrained(folder, device=device, reward_scales=SCALES, **options)


def draw(sampler: FusedSampler, case: Case, steps: int, kind: str = "cpu") -> torch.Tensor:
    """Two images' latents, with generators of this kind of device; every other step is below a finite gate."""
    guidance = sampler.denoiser.guidance
    profile = GapProfile(
        num_inference_steps=steps,
        guidance=guidance.source,
        guidance_scale=guidance.effective_scale,
        images=1,
        mixtures=(RULES["product"].weights,),
        gaps=(tuple(0.0 if k % 2 else 9.0 for k in range(steps)),),
    )
    sampler = replace(sampler, profiles=(profile,)).with_rule(get_rule(case.rule, **case.options))
    return sampler.sample(
        PROMPTS,
        case.weights,
        strength=case.strength,
        num_inference_steps=steps,
        generator=[torch.Generator(kind).manual_seed(i) for i in range(2)],
        output_type="latent",
        progress=False,
    )


SETTINGS: dict[str, type[TrainSettings]] = {"DDPO": DDPOSettings, "DPO": DPOSettings}
TWO = [{"reward": "colourfulness"}, {"reward": "compressibility"}]
RUNS = {  # settings beside those of all
    "one objective": {"reward": "colourfulness"},
    "soup of two objectives": {"objectives": TWO, "train_rule": "soup"},
    "product of two objectives": {"objectives": TWO, "train_rule": "product"},
}


def save_base(folder: Path) -> Path:
    """A base model to be trained, and prompts."""
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def training_settings(base: Path, output: Path, algorithm: str, **own: Any) -> TrainSettings:
    """Of a run of two images and two denoising steps."""
    values = COMMON | {
        "pretrained_model_name_or_path": str(base / "pipeline"),
        "prompts": str(base / "prompts.txt"),
        "output_dir": str(output),
        "train_batch_size": 2,
        "num_validation_images": 2,
        "sample_num_steps": 2,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
    }
    values |= {"num_generations": 2} if algorithm == "DDPO" else {"num_candidates": 2}
    return SETTINGS[algorithm](**values | own)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Waits of one rollout and of the optimiser step on its stored denoising steps, and how many these are."""

    stored: int
    rollout: Waits
    update: Waits


def rollout_and_update(settings: TrainSettings) -> Trained:
    """The second rollout and optimiser step of a run: the first fills what is computed once."""
    forget_accelerator()
    algorithm, accelerator = ALGORITHMS[settings.algorithm](settings), make_accelerator(settings)
    with closing(TrainingReward(settings, accelerator.device)) as reward:
        setup = Setup(settings, accelerator, reward, settings.load_prompts(settings.seed))
        progress = Progress()
        health = Health(progress, skips=False, main=True)
        source = algorithm.source(setup, progress, health)
        update = Update(setup=setup, algorithm=algorithm, health=health)
        for step in range(2):
            with counted() as of_rollout:
                batches, _ = source(step)
            with counted() as of_update:
                update(batches, step + 1)
    return Trained(stored=sum(len(batch.steps) for batch in batches), rollout=of_rollout, update=of_update)
