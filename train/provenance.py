"""What an adapter was made from: its settings, the local files that they name, and the versions of packages."""

import dataclasses
import json
from collections.abc import Mapping
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
    "decode_batch_size",
    "checkpoints_total_limit",
)
# Settings that earlier versions did not have, and their values there: with these the hash is that of the same run then.
ADDED: dict[str, Any] = {
    "variance_options": {},
    "skip_last_steps": 0,
    "max_sequence_length": None,
    "objectives": [],
    "train_rule": "soup",
    "vertex_share": 0.5,
    "vertex_turns": 1,
    "weight_concentration": 1.0,
    "init_set": "",
    "reward_dtype": "float32",
}
EARLIER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # what unset `lora_target_modules` stood for


def provenance(settings: TrainSettings, others: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What an adapter's record says of these.

    `inputs` are the SHA-256 of the local files of prompts and rewards, by the names that the settings give them, and
    of `others`.
    `config_sha256` is of everything that the trained adapter depends on: equal for equal adapters.
    """
    names = [each.reward for each in settings.each]
    rewards = {parse_reward(term.name).path for name in names for term in parse_reward(name).terms}
    named = {settings.prompts, settings.validation_set} | rewards
    inputs = {name: file_hash(Path(name)) for name in sorted(named) if Path(name).is_file()}
    inputs |= others or {}
    config = dataclasses.asdict(settings)
    values = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    for name, default in ADDED.items():
        if values[name] == default:
            del values[name]
    values["lora_target_modules"] = values["lora_target_modules"] or EARLIER_TARGETS
    return {
        "config": config,
        "config_sha256": text_hash(json.dumps({"settings": values, "files": inputs}, sort_keys=True)),
        "inputs": inputs,
        "versions": {name: version(name) for name in PACKAGES},
    }


def config_hash(settings: TrainSettings) -> str:
    """`config_sha256` of these settings."""
    return provenance(settings)["config_sha256"]
