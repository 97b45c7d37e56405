"""`stepfuse build`: from raw rewards to a set that can be published, in one command that can be resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepfuse.data.file_info import text_hash
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.names import nearest
from stepfuse.data.output_file import atomic_file
from stepfuse.data.prompts import load_prompts
from stepfuse.data.run_lock import locked
from stepfuse.data.settings_file import find_config, load_settings, require
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.measure_gaps import describe_gaps, measure_gaps
from stepfuse.fuse.sampling.pictures import STRIP_ROWS, draw_strip
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.card import write_card
from stepfuse.fuse.sets.create import create_set, find_adapters
from stepfuse.fuse.sets.edit import add_evaluation, add_profile
from stepfuse.fuse.sets.manifest import MANIFEST, STRIP
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.run import evaluate
from stepfuse.scripts.recipes.build_config import BuildConfig
from stepfuse.scripts.recipes.training import Training, train
from stepfuse.train.init_set import resolve_objectives, run_hash
from stepfuse.train.settings import SETTINGS

# Settings that all objectives of a set have in common.
SHARED = ("pretrained_model_name_or_path", "max_sequence_length", "resolution", "guidance", "sample_guidance_scale")


def read_build(file: Path) -> tuple[BuildConfig, list[Training], list[Training], EvaluationConfig | None]:
    """A build's YAML, and every configuration it names; a ValueError names what is wrong in any of them."""
    config = load_settings(file, BuildConfig)
    objectives = [_training(entry, config, file) for entry in config.objectives]
    oracles = [_training(entry, config, file) for entry in config.oracles]
    first, names = objectives[0].settings, set()
    for settings in (training.settings for training in (*objectives, *oracles)):
        for each in settings.each:
            require(each.name not in names, "objective_name", each.name, "another name for each objective")
            names.add(each.name)
        for name in SHARED:
            value, expected = getattr(settings, name), getattr(first, name)
            require(value == expected, f"{name} of {settings.title}", value, f"{expected}, as {first.title} has it")
    _launcher(config, file)  # finds a missing file
    if config.guidance not in ("", "off") and first.guidance == "off":
        expected = f"the scale of guidance {config.guidance}, for {first.title} is trained without"
        require(config.guidance_scale is not None, "guidance_scale", config.guidance_scale, expected)
    if config.profile:
        load_prompts(config.profile)
    evaluation = None
    if config.evaluate:
        evaluation = load_settings(_find(config.evaluate, file, "eval"), EvaluationConfig)
    return config, objectives, oracles, evaluation


def build(file: Path, *, device: str) -> Path:
    """Train, create the set, profile, evaluate, write the card; the set's folder. What is done is not repeated.

    Raises:
        ValueError: for a wrong configuration, a training that fails, another build in the same folder.
    """
    config, objectives, oracles, evaluation = read_build(file)
    output, trainings = Path(config.output_dir), [*objectives, *oracles]
    folder, precision = output / "set", {"device": device, "dtype": getattr(torch, config.dtype)}
    with locked(output):
        check_made(output)
        for i, training in enumerate(trainings, start=1):
            finished = training.finished
            state = "done" if finished else training.settings.algorithm
            print(f"[{i}/{len(trainings)}] {training.settings.title}: {state}, {training.folder}", flush=True)
            if not finished:
                train(training, _launcher(config, file))
        loaded = assemble(folder, config, objectives, oracles)
        if config.profile and not loaded.profiles:
            print(f"profile: {config.profile}", flush=True)
            profile = measure_gaps(FusedSampler.from_pretrained(loaded, **precision), load_prompts(config.profile))
            loaded = add_profile(folder, profile)
            print(describe_gaps(profile))
        pictures = None
        if evaluation is not None:
            # Another folder for other adapters or another evaluation.
            identity = [[adapter.sha256 for adapter in loaded.all_adapters], evaluation.identity()]
            identity += [config.dtype] * (config.dtype != "float32")  # which was the only one
            identity += [config.guided] * bool(config.guided)
            digest = text_hash(json.dumps(identity, sort_keys=True, default=str))
            pictures = output / f"evaluation-{digest[:8]}"
            print(f"evaluation: {pictures}", flush=True)
            command = f"stepfuse build {file}"
            # The configurations of the build name the rewards, so they are trusted.
            summary = evaluate(folder, evaluation, pictures, command=command, trust_rewards=True, **precision)
            loaded = add_evaluation(folder, summary)
        if not (folder / STRIP).exists():
            sampler = FusedSampler.from_pretrained(loaded, **precision)
            first = objectives[0].settings
            strip = draw_strip(sampler, first.load_prompts(first.seed)[:STRIP_ROWS])
            with atomic_file(folder / STRIP) as temporary:
                strip.save(temporary)
        write_card(folder, loaded, pictures)
    return folder


def check_made(output: Path) -> Path:
    """The file that records which adapters a set was made of; a ValueError for a set that was not built here."""
    made = output / "set-of.json"
    if (output / "set" / MANIFEST).exists() and not made.exists():
        raise ValueError(f"{output / 'set'} holds a set that was not built here; move it, or choose another output_dir")
    return made


def assemble(
    folder: Path, config: BuildConfig, objectives: Sequence[Training], oracles: Sequence[Training]
) -> AdapterSet:
    """The set of these adapters; an existing set of the same adapters stays, with its profiles and evaluation."""
    made = check_made(folder.parent)
    # Hashes of the trained adapters: stored in float16 they have others.
    trained = [adapter for training in (*objectives, *oracles) for adapter in find_adapters(training.folder)]
    hashes = [adapter.sha256 for adapter in trained]
    identity = {"adapters": hashes, "reference_eta": config.reference_eta, "half": config.half} | config.guided
    if (folder / MANIFEST).exists() and read_json(made, "the parts of a set") == identity:
        return load_set(folder)  # all of it is checked, in case nothing is left to do
    print(f"set: {folder}", flush=True)
    if not made.exists():
        write_json(made, {})  # from here on the set is known to be built here
    created = create_set(
        folder,
        [training.folder for training in objectives],
        oracles=[training.folder for training in oracles],
        base_schedule=EtaSchedule(eta=config.reference_eta),
        **config.guided,
        half=config.half,
        overwrite=True,
    )
    write_json(made, identity)
    return created


def _training(entry: Any, config: BuildConfig, file: Path) -> Training:
    """One entry of `objectives` or `oracles`; its folder is named by objective and configuration."""
    expected = "a mapping with `algorithm` and `config`"
    require(isinstance(entry, dict) and {"algorithm", "config"} <= set(entry), "an objective", entry, expected)
    changes = dict(entry)
    algorithm, name = changes.pop("algorithm"), changes.pop("config")
    known = f"one of {', '.join(SETTINGS)}{nearest(algorithm, SETTINGS)}"
    require(algorithm in SETTINGS, "algorithm", algorithm, known)
    path = _find(name, file, algorithm)
    try:
        settings, _ = resolve_objectives(load_settings(path, SETTINGS[algorithm], changes, besides=("env",)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    name = "joint" if settings.objectives else settings.name
    folder = Path(config.output_dir) / "adapters" / f"{name}-{run_hash(settings)[:8]}"
    return Training(settings=settings, folder=folder)


def _launcher(config: BuildConfig, file: Path) -> Sequence[str]:
    """Arguments of `accelerate launch` for every training; none for one process."""
    if not config.accelerate:
        return ()
    return ["--config_file", str(_find(config.accelerate, file, "accelerate"))]


def _find(name: str, file: Path, folder: str) -> Path:
    """A path as given, or relative to the file that names it, or the name of a packaged configuration in `folder`."""
    for path in (Path(name), file.parent / name):
        if path.is_file():
            return path
    try:
        return find_config(name, folder)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
