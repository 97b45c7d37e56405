"""The commands of the documents at small sizes: the same words, with fewer steps, images and prompts."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import diffusers
import pytest
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from stepfuse.data.settings_file import find_config, load_settings
from stepfuse.data.yaml_file import yaml_text
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.scripts.cli.main import main, parse
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.recipes.build_set import read_build
from stepfuse.train.arguments import parse_settings
from stepfuse.train.distill_run import distill
from stepfuse.train.distill_settings import DistillSettings
from stepfuse.train.loop import train_adapter
from stepfuse.train.settings import SETTINGS, TrainSettings
from tests.fixtures_training import forget_accelerator

EMBEDDED = ("emoji", "emoji-flow")
# Whatever a configuration has: the bundled base takes a second for a step of this size.
SMALL = {
    "max_train_steps": 1,
    "checkpointing_steps": 1,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "timesteps_per_forward": 1,
    "sample_num_steps": 3,
    "skip_first_steps": 0,
    "skip_last_steps": 0,
    "num_candidates": 2,
    "num_generations": 2,
    "fit_reward": 0,
    "num_validation_images": 1,
    "validation_prompts": [],
    "validation_set": "",
    "prompts": "emoji",
    "dataset_name": None,
    "resolution": None,
    "gradient_checkpointing": False,
    "mixed_precision": None,
    "use_8bit_adam": False,
    "offload_text_encoders": False,
    "report_to": "none",
    "overwrite": True,
}
# Appended to a command: the last of two equal flags counts.
FEWER = {
    "benchmark": "--adapters 2 --baselines= --images 1 --steps 1 --repeats 1 --no_memory",
    "set profile": "--prompts emoji-heldout:1",
    "set card": "--prompt apple",
    "publish": "--dry_run",  # tests/test_publish.py and tests/test_space.py have a hub to publish to
}
INSTEAD = {"--steps": "2", "--device": "cpu", "--dtype": "float32"}  # of the value that a command has


@dataclass(frozen=True)
class Launch:
    """One `accelerate launch`, with its words as accelerate itself and the training program understand them."""

    line: str

    @cached_property
    def words(self) -> list[str]:
        return [word for word in shlex.split(self.line, comments=True) if word != "…"]

    @cached_property
    def settings(self) -> TrainSettings:
        """The settings as written. Every flag of the launcher and of the program is checked, and every file is read."""
        launcher = launch_command_parser().parse_args(self.words[2:])
        if launcher.config_file:
            assert load_config_from_file(launcher.config_file).num_processes > 0
        if launcher.module:
            assert find_spec(launcher.training_script)
            name = launcher.training_script.rpartition(".")[2]
        else:
            assert Path(launcher.training_script).is_file()
            name = Path(launcher.training_script).stem
        return parse_settings({**SETTINGS, "distill": DistillSettings}[name], launcher.training_script_args)

    def small(self) -> TrainSettings:
        """Its settings in small, on the bundled base, with a reward that is here."""
        settings = self.settings
        names = {field.name for field in fields(settings)} - settings.fixed
        changes = {name: value for name, value in SMALL.items() if name in names}
        if "pretrained_model_name_or_path" in names and settings.pretrained_model_name_or_path not in EMBEDDED:
            changes |= {"pretrained_model_name_or_path": "emoji", "revision": None, "variant": None}
        if "reward" in names and not _is_here(settings.reward):
            changes |= {"reward": "compressibility", "objective_name": settings.name}
        return replace(settings, **changes)

    def run(self) -> None:
        """Train in this process, which has torch already."""
        settings = self.small()
        with forgotten():
            if isinstance(settings, DistillSettings):
                distill(settings)
            else:
                train_adapter(settings)

    def as_process(self, file: Path) -> list[str]:
        """The same command with a configuration of its small settings."""
        file.write_text(yaml_text(asdict(self.small())))
        place = self.words.index("--config") + 1
        return [*self.words[:place], str(file), *self.words[place + 1 :]]


def _is_here(reward: str) -> bool:
    """Whether a reward needs no download."""
    name, _, which = reward.partition(":")
    return name not in REWARDS or name == "weighted" or not (which or REWARDS[name].files)


@contextmanager
def forgotten() -> Iterator[None]:
    """accelerate keeps one state a process, and training makes libraries silent."""
    verbosity = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    forget_accelerator()
    yield
    forget_accelerator()
    for library, before in zip((diffusers, transformers), verbosity, strict=True):
        library.utils.logging.set_verbosity(before)
        library.utils.logging.enable_progress_bar()


def check_command(words: list[str]) -> None:
    """Parse a command of `stepfuse` by its own parser, and read the configuration that it names."""
    if words[-1] == "--help":
        return
    parsed = parse(words)
    assert callable(parsed.run)
    if words[0] == "build":
        read_build(find_config(parsed.config, "sets"))
    if words[0] == "evaluate" and parsed.config:
        load_settings(find_config(parsed.config, "eval"), EvaluationConfig)


def run_command(words: list[str], folder: Path) -> None:
    """Run a command of `stepfuse` in this process, in small."""
    if words[-1] == "--help":
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        return
    words = [word.partition("@")[0] if word.startswith("OWNER/") else word for word in words]
    words = [INSTEAD.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    for start, flags in FEWER.items():
        if " ".join(words).startswith(start):
            words += shlex.split(flags)
    if words[0] == "evaluate":
        words[words.index("--config") + 1] = str(_small_evaluation(parse(words).config, folder))
    if hasattr(parse(words), "overwrite"):
        words.append("--overwrite")
    for flag in ("--output", "--picture"):
        if flag in words:
            Path(words[words.index(flag) + 1]).parent.mkdir(parents=True, exist_ok=True)
    with forgotten():
        main(words)


def _small_evaluation(config: str, folder: Path) -> Path:
    """Every rule and weight of an evaluation, with fewer prompts, seeds and steps."""
    settings = yaml.safe_load(find_config(config, "eval").read_text())
    settings |= {"prompts": "emoji-heldout:2", "seeds_per_prompt": 2, "steps": 2, "strip_prompts": 1, "kl_seeds": 0}
    for rule in settings["rules"]:
        if isinstance(rule, dict) and rule["rule"] == "code":
            rule |= {"candidates": 2, "block_size": 1}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    return folder / "small.yaml"
