"""Which policy becomes the adapter: the last one, or the checkpoint with the highest validation reward."""

import dataclasses
import math
from typing import Any

from torch import Tensor

from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_to_dict
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.algorithm import Algorithm
from stepfuse.train.checkpoints import Progress
from stepfuse.train.health import Health
from stepfuse.train.kl_by_step import kl_record, show_kl_steps
from stepfuse.train.lora import split_state
from stepfuse.train.output import adapter_folder
from stepfuse.train.settings import TrainSettings
from stepfuse.train.setup import Setup
from stepfuse.train.validation import Validator
from stepfuse.train.validation_points import objective_rewards, objective_validation, paired_gain


def kl_exceeded(settings: TrainSettings, progress: Progress, health: Health) -> bool:
    """Whether the KL of the last step is above `max_kl`, which is noted."""
    limit, kl = settings.max_kl, progress.kl
    if limit is None or kl is None or kl <= limit:
        return False
    health.note("stopped: KL beyond max_kl", progress.step, kl=kl, max_kl=limit)
    return True


def update_best(setup: Setup, progress: Progress, validator: Validator) -> None:
    """Make this policy the best so far if its validation reward is higher than that of the best one before it.

    A best one that was validated under other settings, before the run was resumed, is replaced: their rewards cannot be
    compared.
    """
    if not setup.settings.keeps_best:
        return
    summary = validator.summary()
    comparable = validator.is_comparable(progress.best_settings)
    if progress.best and comparable and summary["reward"] <= progress.best["validation"]["reward"]:
        return
    progress.best = {"step": progress.step, "kl": progress.kl, "validation": summary}
    progress.best_settings, progress.best_state = validator.settings, setup.engine.trainable_state()
    progress.best_kl_steps, progress.best_vertex_kl_steps = progress.kl_steps, progress.vertex_kl_steps
    validator.keep_rewards("best")


def select_policy(setup: Setup, progress: Progress, *, stopped: bool) -> dict[str, Tensor]:
    """The `trainable_state` of the policy that becomes the adapter.

    If that is an earlier one, step, KL and validation of the progress become those of this policy.

    Args:
        stopped: whether the KL limit stopped training.

    Raises:
        ValueError: if training was stopped before the first checkpoint.
    """
    settings = setup.settings
    if not (stopped or settings.load_best_model_at_end):
        return setup.engine.trainable_state()
    if progress.best_state is None:
        raise ValueError(
            f"step {progress.step}: the KL is {progress.kl:.4g} nats per image, above max_kl {settings.max_kl:g}, and "
            f"there is no checkpoint yet; lower checkpointing_steps ({settings.checkpointing_steps}) or learning_rate "
            f"({settings.learning_rate:g})"
        )
    progress.step, progress.kl = progress.best["step"], progress.best["kl"]
    progress.kl_steps, progress.vertex_kl_steps = progress.best_kl_steps, progress.best_vertex_kl_steps
    progress.validation["after"] = progress.best["validation"]
    progress.validation_rewards.pop("after", None)  # of another policy, or of other settings than the best one's
    if "best" in progress.validation_rewards:
        progress.validation_rewards["after"] = progress.validation_rewards["best"]
    return progress.best_state


def write_policy(state: dict[str, Tensor], setup: Setup, algorithm: Algorithm, progress: Progress) -> None:
    """Write a policy to the output folder as an adapter, with its objective and the record of its training.

    Of several objectives each has a folder of its own there, by its name.
    """
    show_kl_steps(setup, progress)
    for index, settings in enumerate(setup.settings.each):
        name, reward = settings.name, setup.reward.objectives[index]
        lora, parameters = split_state(setup.engine.policy.state_of(name, state))
        objective = Objective(
            name=name,
            reward=reward.name,
            variance=setup.sampling.objectives[index].schedule.with_parameters(parameters),
            beta=algorithm.temperature(settings.beta, math.prod(setup.sampling.shape)),
            shaping=reward.shaping,
        )
        adapter = Adapter(
            folder=adapter_folder(setup.output, setup.settings, name),
            objective=objective,
            base=setup.base,
            guidance=settings.guidance,
            guidance_scale=settings.sample_guidance_scale,
            num_inference_steps=settings.sample_num_steps,
            record=training_record(setup, algorithm, progress, settings),
        )
        write_adapter(adapter, network_factors(setup.backbone.network, name, lora), setup.backbone.part)


def training_record(setup: Setup, algorithm: Algorithm, progress: Progress, settings: TrainSettings) -> dict[str, Any]:
    """The record of the training of one objective, with these settings.

    Of several, KL and validation are those with all weight on it, and `joint` says what the run trained together.
    """
    name, several = settings.name, setup.settings.objectives
    kl_steps = progress.vertex_kl_steps.get(name, progress.kl_steps)
    known = [nats for nats in kl_steps if nats is not None]
    gain = paired_gain(objective_rewards(progress, name, name), progress.validation_prompts)
    record: dict[str, Any] = {
        "algorithm": algorithm.name,
        "steps": progress.step,
        "kl": sum(known) if several and known else progress.kl,
        "kl_steps": kl_record(setup, kl_steps),
        "validation": objective_validation(progress, name),
        "gain": vars(gain) if gain else None,
        "best": progress.best,
        "health": progress.health,
    } | setup.record
    if several:
        record["config"] = dataclasses.asdict(settings)
    if settings.init_set:
        record["config"] = record["config"] | lora_on_network(setup, name)
    if several:
        record["joint"] = joint_record(setup.settings) | {"validation": progress.validation}
    return record


def lora_on_network(setup: Setup, name: str) -> dict[str, Any]:
    """The settings of a LoRA that came from a set, where they are not those of the run."""
    config: Any = setup.backbone.network.peft_config[name]
    schedule = setup.sampling.objectives[setup.reward.names.index(name)].schedule
    kind = schedule_to_dict(schedule)["kind"]
    return {"rank": config.r, "lora_alpha": None, "lora_target_modules": None, "variance": kind}


def joint_record(settings: TrainSettings) -> dict[str, Any]:
    """What a run with several objectives trained together, and how."""
    return {
        "objectives": [each.name for each in settings.each],
        "rule": settings.train_rule,
        "vertex_share": settings.vertex_share,
        "weight_concentration": settings.weight_concentration,
    }
