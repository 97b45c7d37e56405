"""What scripts/docs does with its arguments; tests/test_site.py builds the site."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = "-W --keep-going --quiet"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script in a folder of its own, where the program that builds prints its arguments."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "docs", tmp_path / "scripts")
    for name, text in (("scripts/setup", ""), (".venv/bin/sphinx-build", 'echo "$@"')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def docs(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "STEPFUSE_VENV"}
    command = [checkout / "scripts" / "docs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "built"),
    [
        ([], "-b html {flags} {root}/docs {root}/outputs/docs"),
        (["site", "--", "-j", "2"], "-b html {flags} -j 2 {root}/docs site"),
        (["--check_links"], "-b linkcheck {flags} {root}/docs {root}/outputs/docs-links"),
    ],
    ids=["none", "of sphinx-build", "links"],
)
def test_what_follows_two_dashes_goes_to_sphinx_build(checkout: Path, arguments: list[str], built: str) -> None:
    done = docs(checkout, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == built.format(root=checkout, flags=BUILT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-j", "2"], "error: unknown flag -j; see scripts/docs --help"),
        (["--jobs", "2"], "error: unknown flag --jobs; see scripts/docs --help"),
        (["a", "b"], "error: two folders, a and b; expected one"),
    ],
    ids=["short", "long", "folders"],
)
def test_wrong_arguments_are_refused_in_one_line(checkout: Path, arguments: list[str], said: str) -> None:
    done = docs(checkout, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
