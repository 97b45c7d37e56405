"""What an adapter was made from: its settings, the local files that they name, and the versions of packages."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepfuse.data.file_info import file_hash, text_hash
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.train.settings import TrainSettings

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "stepfuse")
# Settings of where a run writes, how fast it is, or what is displayed: the adapter does not depend on them.
WITHOUT_EFFECT = (
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "logging_dir",
    "report_to",
    "async_scoring",
    "checkpoints_total_limit",
)


def input_files(settings: TrainSettings) -> dict[str, str]:
    """SHA-256 of the local files of prompts and rewards, by the names that the settings give them."""
    named = {settings.prompts, settings.validation_set, parse_reward(settings.reward).path}
    return {name: file_hash(Path(name)) for name in sorted(named) if name and Path(name).is_file()}


def config_hash(settings: TrainSettings) -> str:
    """SHA-256 of everything that the trained adapter depends on: equal for equal adapters."""
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in WITHOUT_EFFECT}
    if not settings.variance_options:  # earlier versions did not have it
        del values["variance_options"]
    text = json.dumps({"settings": values, "files": input_files(settings)}, sort_keys=True)
    return text_hash(text)


def provenance(settings: TrainSettings) -> dict[str, Any]:
    """What a record says of these."""
    return {
        "config": dataclasses.asdict(settings),
        "config_sha256": config_hash(settings),
        "inputs": input_files(settings),
        "versions": {name: version(name) for name in PACKAGES},
    }
