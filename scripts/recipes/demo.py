"""`stepfuse demo`: train adapters for two or three rewards together, fuse them, measure the mixtures, and show them."""

import time
from pathlib import Path
from typing import Any

from stepfuse.configs import FOLDER
from stepfuse.data import emoji
from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.run_lock import locked
from stepfuse.data.settings_file import load_settings
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.edit import add_gains
from stepfuse.scripts.recipes.demo_folder import ADAPTERS, PICTURES, RESULTS, SET, claim
from stepfuse.scripts.recipes.demo_mixtures import evaluation_of, measure
from stepfuse.scripts.recipes.demo_report import report
from stepfuse.scripts.recipes.training import Training, train
from stepfuse.train.settings import DPOSettings

CONFIG = "dpo/emoji-flow-joint"
# Of the configuration, where three rewards are trained.
THREE = {
    "objectives": [{"reward": reward} for reward in ("lightness", "subject_size", "contrast")],
    "max_train_steps": 8,
}
QUICK = {"max_train_steps": 1, "sample_num_steps": 4}
# Guidance of the images that are sampled; adapters of the flow base are trained without.
GUIDANCE: dict[str, Any] = {"guidance": "shared", "guidance_scale": emoji.GUIDANCE_SCALES["emoji-flow"]}
PROMPTS, QUICK_PROMPTS = 24, 4


def demo(output: Path, *, seed: int, overwrite: bool, quick: bool, objectives: int = 2) -> None:
    """Train, fuse, measure on held-out prompts, and print what the intervals show.

    Writes the adapters, their set, `slider.png`, `front.png` and `results.json`. If it is interrupted, the same call
    continues it.

    Args:
        output: Folder of the demo.
        seed: Seed of training and of sampling.
        overwrite: Whether a demo in the folder is deleted first.
        quick: Whether it trains for one step and measures few prompts, to check that everything runs.
        objectives: Number of rewards, 2 or 3.

    Raises:
        ValueError: If the folder contains something else or a demo with other settings, or if the training fails.
    """
    began = time.monotonic()
    training = joint_training(output / ADAPTERS, seed=seed, quick=quick, objectives=objectives)
    state = {"objectives": objectives, "seed": seed, "quick": quick, "training": training.sha256}
    with locked(output):
        continued = claim(output, state, overwrite=overwrite)
        if all((output / name).is_file() for name in (RESULTS, *PICTURES)):
            print(f"The demo in {output} is finished; --overwrite starts again.")
            report(output, read_json(output / RESULTS, "the results of a demo"))
            return
        names = " and ".join(training.names) if objectives == 2 else ", ".join(training.names)
        print(f"The rewards: {names}. An interrupted demo is continued by the same command.")
        print(
            f"\n[1/3] Train one adapter for each reward, together on mixtures of the rewards ({CONFIG}.yaml)",
            flush=True,
        )
        if training.finished:
            print(f"They are trained already: {training.folder}")
        else:
            known = progress(training, continued=continued)
            print(f"{known}; the next step is shown after about a minute on two idle cores.", flush=True)
            train(training, summary=False)
        print("\n[2/3] Generate images of held-out prompts with the base and at every mixture", flush=True)
        made = create_set(output / SET, [training.folder], overwrite=True, **GUIDANCE)
        prompts = QUICK_PROMPTS if quick else PROMPTS
        results = measure(output / SET, [output / name for name in PICTURES], seed=seed, prompts=prompts)
        add_gains(output / SET, evaluation_of(results, made.default_rule))
        results["minutes"] = None if continued else (time.monotonic() - began) / 60
        write_json(output / RESULTS, results)
        print("\n[3/3] What it shows")
        report(output, results)


def joint_training(folder: Path, *, seed: int, quick: bool, objectives: int) -> Training:
    """The training of the demo, with a checkpoint after every step; the demo itself measures what it gives."""
    changes: dict[str, Any] = {"seed": seed, "checkpointing_steps": 1, "num_validation_images": 2}
    changes |= (THREE if objectives == 3 else {}) | (QUICK if quick else {})
    settings = load_settings(FOLDER / f"{CONFIG}.yaml", DPOSettings, changes)
    return Training(settings=settings, folder=folder)


def progress(training: Training, *, continued: bool) -> str:
    """How far a training is; `continued` if it was begun before."""
    checkpoints, steps = list_checkpoints(training.folder), f"{training.settings.max_train_steps} steps"
    if not checkpoints:
        return f"No step was saved yet, so it begins with the first of {steps}" if continued else f"It takes {steps}"
    return f"Continuing after step {checkpoints[-1].name.partition('-')[2]} of {steps}"
