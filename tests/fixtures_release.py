"""The package as it would be released."""

import os
from pathlib import Path

import pytest

from stepfuse.scripts.release.packages import build_packages
from stepfuse.scripts.release.processes import Shell

ROOT = Path(__file__).parents[1]


def built_wheel(folders: pytest.TempPathFactory) -> Path:
    """The wheel that the variable STEPFUSE_WHEEL names, or one built from the checkout, with its sdist."""
    if given := os.environ.get("STEPFUSE_WHEEL"):
        return Path(given)
    folder = folders.mktemp("release")
    return build_packages(ROOT, folder, Shell(folder=folder, log=folder / "log.txt", environment=os.environ)).wheel
