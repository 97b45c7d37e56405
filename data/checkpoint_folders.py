"""Folders of checkpoints, `checkpoint-500`, in the output folder of a training. Nothing here imports torch."""

import re
from pathlib import Path


def is_checkpoint(folder: Path) -> bool:
    """Whether a path has the name of a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoints, complete or not, oldest first."""
    return sorted(filter(is_checkpoint, output.glob("checkpoint-*")), key=lambda p: int(p.name.split("-")[1]))
