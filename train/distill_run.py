"""A distillation, from its settings to the folder of the students."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stepfuse.data.run_lock import locked
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.checkpoints import Progress, load_checkpoint
from stepfuse.train.display import describe_start, next_commands
from stepfuse.train.distill_settings import DistillSettings, with_set
from stepfuse.train.distill_setup import DistillSetup
from stepfuse.train.distillation import Distillation
from stepfuse.train.gap_validation import GapValidator, describe_validation, distilled_record
from stepfuse.train.health import Health
from stepfuse.train.launch import end_run, make_accelerator
from stepfuse.train.loop import fit
from stepfuse.train.memory import oom_hints
from stepfuse.train.output import adapter_folder, begin_output, disk_hints, find_start
from stepfuse.train.trackers import start_trackers


def distill(settings: DistillSettings) -> Path:
    """Distil a set, and write a student for each of its adapters to a folder of its name in `settings.output_dir`.

    Raises:
        ValueError: for a set that cannot be distilled, settings that do not fit together, a folder in use, a loss that
            is not finite, and a disk or memory that is full.
    """
    adapter_set = load_set(settings.adapter_set, read_weights=False)
    settings = with_set(settings, adapter_set)
    output = Path(settings.output_dir)
    with locked(output), disk_hints(output), oom_hints(settings):
        start = find_start(
            output, settings.resume_from_checkpoint, names=adapter_set.names, overwrite=settings.overwrite
        )
        prompts = settings.load_prompts(settings.seed)
        run(DistillSetup(settings, make_accelerator(settings), prompts, adapter_set), start)
    return output


def run(setup: DistillSetup, start: Path | None) -> None:
    """Distil from a checkpoint, or from the beginning if there is none, and write the students."""
    settings, accelerator = setup.settings, setup.accelerator
    main, algorithm = accelerator.is_main_process, Distillation(settings)
    progress = load_checkpoint(start, setup.engine) if start else Progress()
    if main and (text := describe_start(settings, start, progress.step)):
        print(text, flush=True)
    health = Health(progress, skips=settings.nonfinite == "skip", main=main)
    validator = GapValidator(setup, progress)
    setup.embed.report([*setup.prompts, *validator.prompts])
    if start is None:
        validator.record("before")
    if main:
        begin_output(setup.output, settings, overwrite=settings.overwrite and start is None)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, settings)
    fit(setup, algorithm, algorithm.source(setup), progress, health, validate=validator.save)
    validator.record("after")
    state = setup.engine.trainable_state()
    if main:
        write_students(state, setup, progress)
        lines = [f"students of {settings.adapter_set}, step {progress.step}: {setup.output}"]
        lines += describe_validation(progress.validation["before"], progress.validation["after"])
        lines.append("next, make a set of them, and generate images with one network in place of all adapters:")
        commands = next_commands(setup.output, validator.prompts[0], "--rule", "product", "--gate", "inf")
        print("\n".join([*lines, *commands]), flush=True)
    end_run(accelerator)


def write_students(state: Mapping[str, Tensor], setup: DistillSetup, progress: Progress) -> None:
    """Write each student as an adapter, with its teacher's objective."""
    distilled = distilled_record(setup, progress)
    for teacher in setup.adapter_set.adapters:
        lora = setup.engine.policy.state_of(teacher.name, state)
        record = {
            "algorithm": Distillation.name,
            "steps": progress.step,
            "health": progress.health,
            "distilled": distilled,
            "teacher": teacher.record,
        } | setup.record
        if before := (teacher.record.get("validation") or {}).get("before"):
            record["validation"] = {"before": before}  # of the base's images; the unit of the reward
        student = Adapter(
            folder=adapter_folder(setup.output, setup.settings, teacher.name),
            objective=teacher.objective,
            base=setup.base,
            guidance=setup.settings.guidance,
            guidance_scale=setup.settings.sample_guidance_scale,
            num_inference_steps=setup.settings.sample_num_steps,
            record=record,
            license=teacher.license,
        )
        write_adapter(student, network_factors(setup.backbone.network, teacher.name, lora), setup.backbone.part)
