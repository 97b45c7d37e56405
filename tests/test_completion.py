"""Shell completion, as a shell asks for it: argcomplete's protocol, in processes that cannot import torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepfuse.configs import FOLDER
from stepfuse.rewards.catalogue import REWARDS

STEPFUSE = Path(sys.executable).parent / "stepfuse"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for name in ("torch.py", "mine.py", "mine.yaml", "mine.txt", "sets/one/adapter_set.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "torch.py").write_text("raise RuntimeError('torch is imported')")
    return folder


def completions(line, folder):
    answer = folder / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run([STEPFUSE], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in answer.read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stepfuse sa", ["sample"]),
        ("stepfuse be", ["benchmark"]),
        ("stepfuse benchmark t", ["training"]),
        ("stepfuse benchmark ", ["sampling", "rewards", "training", "serve", "emoji", "emoji-flow", "sets/"]),
        ("stepfuse benchmark emo", ["emoji", "emoji-flow"]),
        ("stepfuse benchmark emoji --ad", ["--adapters"]),
        ("stepfuse benchmark sampling emoji --rules product,sou", ["soup", "soup_factors"]),
        ("stepfuse benchmark training --al", ["--algorithms"]),
        ("stepfuse set ex", ["export"]),
        ("stepfuse sample e", ["emoji", "emoji-flow"]),
        ("stepfuse sample sets/", ["sets/one/"]),
        ("stepfuse sample emoji --rule sou", ["soup", "soup_factors"]),
        ("stepfuse sample emoji --weights alignment=0.5,co", ["compressibility=", "colourfulness="]),
        ("stepfuse sample emoji --unknown --negative-prompt x --guidance_i", ["--guidance_interval"]),
        ("stepfuse reward score ", [*REWARDS, "sets/", "mine.py", "torch.py", "mine.yaml"]),
        ("stepfuse evaluate emoji --config eval/", [f"eval/{file.stem}" for file in (FOLDER / "eval").glob("*.yaml")]),
    ],
)
def test_the_shell_is_offered_what_may_follow(here, line, expected):
    found = [word.rpartition(",")[2] for word in completions(line, here)]
    assert sorted(found) == sorted(expected)


def test_the_completion_script_of_argcomplete_serves_the_command():
    """The line that docs/get-started.md gives; bash runs what it prints."""
    register = STEPFUSE.parent / "register-python-argcomplete"
    script = subprocess.run([register, "stepfuse"], capture_output=True, text=True, check=True).stdout
    asked = 'complete -p stepfuse; COMP_LINE="stepfuse sam" COMP_POINT=12 COMP_TYPE=9; COMP_WORDS=(stepfuse sam); '
    asked += '_python_argcomplete "$0"; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked.replace('$0', str(STEPFUSE))}"], capture_output=True, text=True
    )
    assert "stepfuse" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1].strip() == "sample", done.stderr
