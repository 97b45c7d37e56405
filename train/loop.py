"""Training an adapter, or several together, from settings to the folder of the adapters."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from stepfuse.data.run_lock import locked
from stepfuse.data.stages import stage
from stepfuse.fuse.rules.objective import Objective
from stepfuse.train.algorithm import Algorithm, AlignmentAlgorithm, Source
from stepfuse.train.algorithms import ALGORITHMS
from stepfuse.train.checkpoints import Progress, load_checkpoint, save_checkpoint
from stepfuse.train.display import ProgressDisplay, describe_end, describe_start
from stepfuse.train.health import Health
from stepfuse.train.init_set import resolve_objectives
from stepfuse.train.kl_by_step import keep_kl_steps, warn_of_dominant_step
from stepfuse.train.launch import end_run, make_accelerator
from stepfuse.train.memory import oom_hints
from stepfuse.train.output import begin_output, disk_hints, find_start
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import TrainSettings
from stepfuse.train.setup import ModelSetup, Setup
from stepfuse.train.trackers import start_trackers
from stepfuse.train.trained_policy import kl_exceeded, select_policy, update_best, write_policy
from stepfuse.train.update import Update
from stepfuse.train.validation import Validator, fit_reward


def train_adapter(settings: TrainSettings, algorithm: AlignmentAlgorithm[Any] | None = None) -> Path:
    """Train one adapter and write it to `settings.output_dir`, which is returned; of several objectives each has an
    adapter in a folder of its name there.

    Settings that are wrong or do not fit together are found before the first step, and before anything is written.

    Args:
        algorithm: by default the one of the settings: `DPOSettings` train by DPO, `DDPOSettings` by DDPO.

    Raises:
        ValueError: for settings that do not fit together, a folder in use, a faulty reward, a loss that is not finite,
            and a disk or memory that is full.
    """
    output = Path(settings.output_dir)
    with locked(output), disk_hints(output), oom_hints(settings):
        settings, initial = resolve_objectives(settings)
        algorithm = algorithm or ALGORITHMS[settings.algorithm](settings)
        names = [each.name for each in settings.each] if settings.objectives else []
        start = find_start(output, settings.resume_from_checkpoint, names=names, overwrite=settings.overwrite)
        prompts = settings.load_prompts(settings.seed)
        accelerator = make_accelerator(settings)
        check_run(settings, algorithm, accelerator.num_processes)
        with closing(TrainingReward(settings, accelerator.device)) as reward:
            run(Setup(settings, accelerator, reward, prompts, initial=initial), algorithm, start)
    return output


def run(setup: Setup, algorithm: AlignmentAlgorithm[Any], start: Path | None) -> None:
    """Train from a checkpoint, or from the beginning if there is none, and write the adapter."""
    settings, accelerator = setup.settings, setup.accelerator
    progress = load_checkpoint(start, setup.engine) if start else Progress()
    if accelerator.is_main_process and (text := describe_start(settings, start, progress.step)):
        print(text, flush=True)
    if accelerator.is_main_process:
        warn_of_dominant_step(setup)
    health = Health(progress, skips=settings.nonfinite == "skip", main=accelerator.is_main_process)
    source = algorithm.source(setup, progress, health)
    validator = Validator(setup, progress)
    setup.embed.report([*setup.prompts, *validator.prompts])
    fit_reward(setup, progress)
    if start is None:
        stage(f"Generating {len(validator.prompts) * len(validator.points)} validation images before training …")
        validator.current()  # finds a faulty reward before anything is written
    if accelerator.is_main_process:
        begin_output(setup.output, settings, overwrite=settings.overwrite and start is None)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, settings)
    if start is None:
        validator.record("before")
    if settings.trackers:
        validator.draw_base()
    keep_best = partial(update_best, setup, progress, validator)
    if setup.prompts:  # else it trains on preference pairs, without rewards
        varies = " and mixtures of the rewards" if settings.objectives else ""
        stage(f"Each step has other prompts{varies}, so its mean rewards vary from those of the step before.")
    stage(f"Training to step {settings.max_train_steps} …")
    stopped = fit(setup, algorithm, source, progress, health, validate=validator.save, before_checkpoint=keep_best)
    if not stopped:
        stage("Generating the validation images after training …")
        validator.record("after")
        keep_best()
    state = select_policy(setup, progress, stopped=stopped)
    if accelerator.is_main_process:
        write_policy(state, setup, algorithm, progress)
        setup.embed.report_streamed()
        print(describe_end(settings, progress, [reward.name for reward in setup.reward.objectives]), flush=True)
    end_run(accelerator)


def fit(
    setup: ModelSetup,
    algorithm: Algorithm[Any],
    source: Source[Any],
    progress: Progress,
    health: Health,
    *,
    validate: Callable[[], None],
    before_checkpoint: Callable[[], None] = lambda: None,
) -> bool:
    """Take optimiser steps up to `max_train_steps`; whether the KL limit stopped training.

    Args:
        validate: called every `validation_steps`.
        before_checkpoint: called before each checkpoint is written.
    """
    settings = setup.settings
    update = Update(setup=setup, algorithm=algorithm, health=health)
    main = setup.accelerator.is_main_process
    display = ProgressDisplay(settings, progress.step, images=setup.total_batch_size, shown=main)
    stopped = False
    while progress.step < settings.max_train_steps and not stopped:
        before = progress.step
        display.resume_clock()
        batches, of_rollout = source(before)
        for index in range(min(algorithm.updates_per_rollout, settings.max_train_steps - before)):
            measured = update(batches, progress.step + 1, first=index == 0) | of_rollout
            progress.step += 1
            if "kept_pairs" in measured:
                health.check_pairs(measured["kept_pairs"], progress.step, algorithm.margin)
            progress.kl = measured.get("kl")
            keep_kl_steps(progress, measured, len(setup.sampling.steps), setup.engine.policy.adapters)
            display.advance(measured, new_images=index == 0)
            setup.accelerator.log(measured, step=progress.step)
            if stopped := kl_exceeded(settings, progress, health):
                break
            if settings.validation_steps and progress.step % settings.validation_steps == 0:
                validate()
                display.resume_clock()
        # Between rollouts only: a run could not be resumed exactly from the middle of one.
        crossed = progress.step // settings.checkpointing_steps > before // settings.checkpointing_steps
        if crossed and not stopped:
            before_checkpoint()
            save_checkpoint(setup.output, setup.engine, progress, settings.checkpoints_total_limit)
    display.close()
    return stopped


def check_run(settings: TrainSettings, algorithm: Algorithm[Any], processes: int) -> None:
    """Check the name and beta of each objective, and that the images of a step can be divided into groups."""
    for each in settings.each:
        Objective(name=each.name, reward=each.reward, variance=each.initial_schedule(), beta=each.beta)
    total = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    if total % algorithm.group_size:
        raise ValueError(
            f"{total} images per step (train_batch_size × gradient_accumulation_steps × processes) cannot be divided "
            f"into groups of num_generations = {algorithm.group_size}"
        )
