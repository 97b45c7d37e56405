"""`stepfuse build`: from raw rewards to a set that can be published, in one command that can be resumed."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from stepfuse.data.file_info import text_hash
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.names import nearest
from stepfuse.data.output_file import atomic_file
from stepfuse.data.prompts import load_prompts
from stepfuse.data.settings_file import check_names, check_types, find_config, read_settings, require
from stepfuse.data.text_files import write_text
from stepfuse.data.yaml_file import yaml_text
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sampling.measure_gaps import describe_gaps, measure_gaps
from stepfuse.fuse.sampling.pictures import STRIP_ROWS, draw_strip
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.card import write_card
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.edit import add_evaluation, add_profile
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.fuse.sets.manifest import MANIFEST, STRIP
from stepfuse.scripts.evaluation.config import EvaluationConfig, read_config
from stepfuse.scripts.evaluation.run import evaluate
from stepfuse.train import ddpo, dpo
from stepfuse.train.output import locked
from stepfuse.train.provenance import config_hash
from stepfuse.train.settings import DDPOSettings, DPOSettings, TrainSettings

PROGRAMS: dict[str, tuple[str, type[TrainSettings]]] = {
    "dpo": (str(dpo.__file__), DPOSettings),
    "ddpo": (str(ddpo.__file__), DDPOSettings),
}
SUPERVISOR = Path(__file__).parent / "supervisor.py"
SINGLE_PROCESS = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The settings of `stepfuse build`, as YAML gives them.

    Attributes:
        output_dir: the folder for adapters, set and evaluation.
        objectives: mappings of `algorithm`, dpo or ddpo, `config`, the YAML of a training, and any settings that
            override it.
        oracles: the same for adapters trained on weighted: rewards.
        accelerate: a configuration of accelerate for every training; by default one process in float32.
        reference_eta: eta of the base in the set.
        half: store the set's weights in float16.
        profile: prompts on which the gap between soup and product is measured, for `sample --gate`; none by default.
        evaluate: an evaluation's YAML; none by default.
    """

    output_dir: str = "outputs/set"
    objectives: list = field(default_factory=list)
    oracles: list = field(default_factory=list)
    accelerate: str = ""
    reference_eta: float = 1.0
    half: bool = False
    profile: str = ""
    evaluate: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.objectives), "objectives", self.objectives, "a mapping of algorithm and config for each")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One adapter to be trained.

    Attributes:
        folder: named by objective and configuration, so that another configuration has another folder.
    """

    algorithm: str
    settings: TrainSettings
    sha256: str
    folder: Path

    @property
    def finished(self) -> Adapter | None:
        """The adapter, where it was trained with these settings."""
        try:
            adapter = read_adapter(self.folder)
        except ValueError:
            return None
        return adapter if adapter.record.get("config_sha256") == self.sha256 else None


def read_build(file: Path) -> tuple[BuildConfig, list[Training], list[Training], EvaluationConfig | None]:
    """A build's YAML, and every configuration it names; a path is looked for here and beside the file.

    Raises:
        ValueError: for anything wrong in any of them, before anything is trained.
    """
    config = BuildConfig(**read_settings(file, BuildConfig))
    objectives = [_training(entry, config, file) for entry in config.objectives]
    oracles = [_training(entry, config, file) for entry in config.oracles]
    first, names = objectives[0].settings, set()
    for settings in (training.settings for training in (*objectives, *oracles)):
        require(settings.name not in names, "objective_name", settings.name, "another name for each objective")
        names.add(settings.name)
        for name in ("pretrained_model_name_or_path", "guidance", "sample_guidance_scale"):
            value, expected = getattr(settings, name), getattr(first, name)
            require(value == expected, f"{name} of {settings.name}", value, f"{expected}, as {first.name} has it")
    if config.accelerate:
        _find(config.accelerate, file, "accelerate")
    if config.profile:
        load_prompts(config.profile)
    return config, objectives, oracles, read_config(_find(config.evaluate, file, "eval")) if config.evaluate else None


def build(file: Path, *, device: str) -> Path:
    """Train what is not trained, create the set, profile, evaluate, write the card; the set's folder.

    Run again, it resumes where it was interrupted, and repeats nothing that is done.

    Raises:
        ValueError: for a wrong configuration, a training that fails, another build in the same folder.
    """
    config, objectives, oracles, evaluation = read_build(file)
    output = Path(config.output_dir)
    with locked(output):
        check_made(output)
        configuration = config.accelerate and str(_find(config.accelerate, file, "accelerate"))
        launcher: Sequence[str] = ["--config_file", configuration] if configuration else SINGLE_PROCESS
        trainings = [*objectives, *oracles]
        for i, training in enumerate(trainings, start=1):
            heading = f"[{i}/{len(trainings)}] {training.settings.name}"
            if training.finished:
                print(f"{heading}: done, {training.folder}", flush=True)
                continue
            print(f"{heading}: {training.algorithm}, {training.folder}", flush=True)
            train(training, launcher)
        folder = output / "set"
        loaded = assemble(folder, config, objectives, oracles)
        if config.profile and not loaded.profiles:
            print(f"profile: {config.profile}", flush=True)
            sampler = FusedSampler.from_pretrained(loaded, device=device)
            profile = measure_gaps(sampler, load_prompts(config.profile))
            add_profile(folder, profile)
            print(describe_gaps(profile))
            loaded = load_set(folder)
        pictures = None
        if evaluation is not None:
            pictures = output / f"evaluation-{_identity(loaded, evaluation)}"
            print(f"evaluation: {pictures}", flush=True)
            summary = evaluate(
                folder,
                evaluation,
                pictures,
                overwrite=False,
                device=device,
                dtype=torch.float32,
                command=f"stepfuse build {file}",
                trust_rewards=True,  # the configurations of the build name them
            )
            loaded = add_evaluation(folder, summary)
        if not (folder / STRIP).exists():
            sampler = FusedSampler.from_pretrained(loaded, device=device)
            strip = draw_strip(sampler, load_prompts(objectives[0].settings.prompts)[:STRIP_ROWS])
            with atomic_file(folder / STRIP) as temporary:
                strip.save(temporary)
        write_card(folder, loaded, pictures)
    return folder


def train(training: Training, launcher: Sequence[str]) -> None:
    """Train by `accelerate launch`, from the newest checkpoint if there is one.

    Raises:
        ValueError: where the training fails or writes no complete adapter.
    """
    program, _ = PROGRAMS[training.algorithm]
    file = training.folder.with_name(training.folder.name + ".yaml")
    values = asdict(training.settings) | {"resume_from_checkpoint": "latest", "output_dir": str(training.folder)}
    with atomic_file(file) as temporary:
        write_text(temporary, yaml_text({k: v for k, v in values.items() if v is not None}))
    launch(program, ["--config", str(file)], launcher, training.settings.name)
    if not training.finished:
        raise ValueError(f"training {training.settings.name!r} wrote no complete adapter to {training.folder}")


def launch(program: str, arguments: Sequence[str], launcher: Sequence[str], name: str) -> None:
    """Run one training with `accelerate launch`. Its processes end with this one, even where this one is killed.

    Raises:
        ValueError: where it ends with another status than 0.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launcher]
    command += ["--num_cpu_threads_per_process", str(torch.get_num_threads()), program, *arguments]
    supervised = [sys.executable, "-P", str(SUPERVISOR), *command]
    # Its standard input closes when this process ends. In a new session it gets no Ctrl-C from the terminal.
    with subprocess.Popen(supervised, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            status = process.wait()
        except BaseException:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            raise
    if status:
        raise ValueError(f"training {name!r} ended with status {status}; see the lines above, and run again to resume")


def check_made(output: Path) -> Path:
    """The path of the file that records which adapters the set of a build was made of.

    Raises:
        ValueError: for a set that was not built here, which this build would replace.
    """
    made = output / "set-of.json"
    if (output / "set" / MANIFEST).exists() and not made.exists():
        raise ValueError(f"{output / 'set'} holds a set that was not built here; move it, or choose another output_dir")
    return made


def assemble(
    folder: Path, config: BuildConfig, objectives: Sequence[Training], oracles: Sequence[Training]
) -> AdapterSet:
    """The set of these adapters; an existing set of the same adapters stays, with its profiles and evaluation."""
    wanted = [read_adapter(training.folder) for training in (*objectives, *oracles)]
    reference = EtaSchedule(eta=config.reference_eta)
    made = check_made(folder.parent)  # hashes of the trained adapters: stored in float16 they have others
    identity = {"adapters": [a.sha256 for a in wanted], "reference_eta": config.reference_eta, "half": config.half}
    if (folder / MANIFEST).exists() and made.exists() and read_json(made, "the parts of a set") == identity:
        return load_set(folder)
    print(f"set: {folder}", flush=True)
    if not made.exists():
        write_json(made, {})  # from here on the set is known to be built here
    created = create_set(
        folder,
        [training.folder for training in objectives],
        oracles=[training.folder for training in oracles],
        base_schedule=reference,
        half=config.half,
        overwrite=True,
    )
    write_json(made, identity)
    return created


def _training(entry: Any, config: BuildConfig, file: Path) -> Training:
    """One entry of `objectives` or `oracles`."""
    expected = "a mapping with `algorithm` and `config`"
    require(isinstance(entry, dict) and {"algorithm", "config"} <= set(entry), "an objective", entry, expected)
    known = f"one of {', '.join(PROGRAMS)}{nearest(entry['algorithm'], PROGRAMS)}"
    require(entry["algorithm"] in PROGRAMS, "algorithm", entry["algorithm"], known)
    _, kind = PROGRAMS[entry["algorithm"]]
    changes = {name: value for name, value in entry.items() if name not in ("algorithm", "config")}
    path = _find(entry["config"], file, entry["algorithm"])
    values = read_settings(path, kind, besides=("env",))
    values.pop("env", None)
    try:
        check_names(changes, kind)
        settings = kind(**values | changes)
    except ValueError as error:
        raise ValueError(f"{file}: {path}: {error}") from error
    sha256 = config_hash(settings)
    folder = Path(config.output_dir) / "adapters" / f"{settings.name}-{sha256[:8]}"
    return Training(algorithm=entry["algorithm"], settings=settings, sha256=sha256, folder=folder)


def _find(name: str, file: Path, folder: str) -> Path:
    """A path as given, or relative to the file that names it, or the name of a packaged configuration in `folder`."""
    for path in (Path(name), file.parent / name):
        if path.is_file():
            return path
    try:
        return find_config(name, folder)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _identity(loaded: AdapterSet, evaluation: EvaluationConfig) -> str:
    """Eight hexadecimal digits for these adapters and this evaluation, so that another has another folder."""
    adapters = [adapter.sha256 for adapter in (*loaded.adapters, *(oracle.adapter for oracle in loaded.oracles))]
    text = json.dumps([adapters, asdict(evaluation)], sort_keys=True, default=str)
    return text_hash(text)[:8]
