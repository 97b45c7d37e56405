"""What scripts/setup shows while pip installs, with a program in the place of the environment's Python."""

import os
import pty
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def set_up(folder: Path, program: str) -> tuple[int, str, str]:
    """Exit status, what a terminal showed, and stderr of the script, where Python runs this program of the shell."""
    for name in ("scripts/setup", "pyproject.toml", "configs/constraints.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    script = folder / "scripts" / "setup"
    environment = {name: value for name, value in os.environ.items() if name != "STEPFUSE_VENV"}
    ours, terminal = pty.openpty()
    try:
        done = subprocess.run([script], stdout=terminal, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # of a terminal that nobody writes to any more
            while part := os.read(ours, 100_000):
                shown += part
    finally:
        os.close(ours)
    return done.returncode, shown.decode(), done.stderr


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("  Downloading torch-2.0.0-cp311-none-any.whl (190.0 MB)", "s: Downloading torch-2.0.0 (190.0 MB)"),
        ("Installing collected packages: a, b, c", "s: installed 1 of 3 packages"),
    ],
    ids=["download", "installation"],
)
def test_one_line_says_what_pip_does(tmp_path: Path, printed: str, shown: str) -> None:
    status, terminal, errors = set_up(
        tmp_path,
        f"echo '{printed}'; echo 'a warning' >&2; sleep 0.1\n"
        "new=.venv/lib/python3/site-packages/a.dist-info; mkdir -p $new; touch $new; sleep 2.4",
    )
    assert (status, errors) == (0, "")
    *lines, last = terminal.rstrip().splitlines()
    assert shown in "".join(lines)
    assert last.endswith("ready; activate it by: source " + str(tmp_path / ".venv/bin/activate"))


def test_an_installation_that_fails_says_why(tmp_path: Path) -> None:
    status, terminal, errors = set_up(tmp_path, "echo 'ERROR: no such package' >&2; exit 1")
    assert (status, errors) == (1, "ERROR: no such package\n")
    assert "ready" not in terminal
