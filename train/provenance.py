"""What an adapter was made from: its settings and the local files they name, as one hash."""

import dataclasses
import json
from pathlib import Path

from stepfuse.data.file_info import file_hash, text_hash
from stepfuse.train.settings import TrainSettings

# They say where a run writes, how fast it is, or what is looked at: not what comes out.
ASIDE = (
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
    named = {settings.prompts, settings.validation_set, settings.reward.rpartition(":")[0] or settings.reward}
    return {name: file_hash(Path(name)) for name in sorted(named) if name and Path(name).is_file()}


def config_hash(settings: TrainSettings) -> str:
    """SHA-256 of all that decides what a training makes; the same for the same adapter."""
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in ASIDE}
    text = json.dumps({"settings": values, "files": input_files(settings)}, sort_keys=True)
    return text_hash(text)
