"""The output folder of a run: never overwritten by accident, and the checkpoint to start from."""

import dataclasses
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.data.folder_files import files_below, files_named
from stepfuse.data.kl_steps import KL_PICTURE
from stepfuse.data.output_folder import delete_files, require_empty_dir
from stepfuse.data.run_lock import LOCK
from stepfuse.data.text_files import write_text
from stepfuse.data.yaml_file import read_yaml, yaml_text
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.objective import NAME
from stepfuse.fuse.sets.manifest import OBJECTIVE
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.train.checkpoints import checkpoint_files, find_checkpoint, newest_intact
from stepfuse.train.settings import TrainSettings

CONFIG = "config.yaml"


def find_start(folder: Path, wanted: str | None, *, names: Sequence[str] = (), overwrite: bool) -> Path | None:
    """The checkpoint to resume from; None to start from the beginning.

    Args:
        wanted: `latest`, the name or path of a checkpoint's folder, or None to start from the beginning.
        names: of the objectives, for a run with several.

    Raises:
        ValueError: for a folder that is not empty, or with `overwrite` for files of other programs that the run would
            replace or delete; and for a checkpoint that does not exist or is damaged.
    """
    checkpoints = [path.name for path in list_checkpoints(folder)]
    if wanted == "latest":
        if newest := newest_intact(folder):
            return newest
        if checkpoints:
            raise ValueError(f"no checkpoint in {folder} is intact: {', '.join(checkpoints)}; train again")
        if (folder / OBJECTIVE).exists() or any(folder.glob(f"*/{OBJECTIVE}")):
            raise ValueError(
                f"{folder} contains a finished adapter and no checkpoint to resume from; choose another folder"
            )
        if (folder / CONFIG).exists():  # a run was interrupted before its first checkpoint
            return None
    elif wanted is not None:
        return find_checkpoint(folder, wanted)
    # Of checkpoints the oldest would be deleted.
    adapters = [f"{name}/{file}" for name in names for file in (OBJECTIVE, WEIGHTS)] if names else [OBJECTIVE, WEIGHTS]
    writes = (CONFIG, *adapters, KL_PICTURE, *checkpoints)
    require_empty_dir(
        folder, overwrite=overwrite, ours=training_files, writes=writes, besides=(LOCK,), option="--output_dir"
    )
    return None


def training_files(folder: Path) -> set[Path]:
    """The files of a run in a folder, which --overwrite replaces; none if there was no run."""
    files = checkpoint_files(folder)
    try:
        config = read_yaml(folder / CONFIG)
    except ValueError:
        config = None
    started = isinstance(config, dict) and {"pretrained_model_name_or_path", "output_dir"} <= set(config)
    if started or (folder / OBJECTIVE).is_file():
        files |= files_named(folder, OBJECTIVE, WEIGHTS, KL_PICTURE, *([CONFIG] if started else []))
        for name in _objective_names(config) if started else []:
            files |= files_named(folder, f"{name}/{OBJECTIVE}", f"{name}/{WEIGHTS}")
        files |= {file for file in files_below(folder, "samples") if file.match("step-*.png")}
        logs = Path(str(config.get("logging_dir", "logs")) if started else "logs", "stepfuse")
        if not logs.is_absolute() and ".." not in logs.parts:
            files |= files_below(folder, str(logs))
    return files


def begin_output(folder: Path, settings: TrainSettings, *, overwrite: bool) -> None:
    """Write the configuration of a run; with `overwrite`, first delete the files of an earlier one, and no others."""
    if overwrite:
        delete_files(folder, training_files(folder))
    write_text(folder / CONFIG, yaml_text(dataclasses.asdict(settings)))


def adapter_folder(folder: Path, settings: TrainSettings, name: str) -> Path:
    """The folder of an objective's adapter: that of the run, or one in it if the run has several."""
    return folder / name if settings.objectives else folder


def _objective_names(config: Mapping[str, Any]) -> list[str]:
    """The names of several objectives in the configuration that a run has written."""
    names: list[str] = []
    for entry in config.get("objectives") or []:
        with suppress(ValueError, TypeError, AttributeError, KeyError):  # of a file that someone has changed
            reward = entry.get("reward") or config["reward"]
            names.append(str(entry.get("objective_name") or parse_reward(reward).objective))
    return [name for name in names if NAME.fullmatch(name)]


@contextmanager
def disk_hints(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a ValueError that says what was kept and how to resume."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # those of safetensors have no number
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise
        raise ValueError(
            f"{folder} cannot be written: {' '.join(str(error).split())}; checkpoints are kept, so free some space and "
            "resume with --resume_from_checkpoint latest"
        ) from error
