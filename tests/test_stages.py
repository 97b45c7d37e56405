"""Programs say on stderr what they load before they load it; the library says nothing."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepfuse.data.stages import counted, stage, stages_shown

LINES = [  # command lines that import torch
    "demo",
    "sample emoji --prompt x",
    "serve emoji --port 0",
    "evaluate emoji --config eval/emoji",
    "evaluate --world gmm",
    "build sets/emoji",
    "set create new --adapter emoji-set/alignment",
    "set validate emoji",
    "set show emoji",
    "set profile emoji-set",
    "set card emoji-set",
    "set import emoji-set/alignment/pytorch_lora_weights.safetensors --objective a --eta 1 --set new",
    "set export emoji",
    "set merge emoji",
    "pull OWNER/NAME",
    "publish emoji OWNER/NAME --dry_run",
    "reward list",
    "reward score colourfulness --images emoji-set --prompts emoji-set/README.md",
    "reward serve colourfulness",
    "benchmark emoji",
    "benchmark training",
    "benchmark serve emoji",
]
UNTIL_TORCH = """
import contextlib, io, json, sys, time

class Torch(BaseException):
    pass

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise Torch

sys.meta_path.insert(0, Finder)
from stepfuse.scripts.cli.main import main
from stepfuse.train import distill, dpo

def train(program, *words):
    sys.argv = ["train", *words]
    program.main()

programs = [(line, lambda line=line: main(line.split())) for line in json.load(sys.stdin)]
programs.append(("dpo", lambda: train(dpo, "--config", "dpo/emoji-flow-joint")))
programs.append(("distill", lambda: train(distill, "emoji")))
said = {}
for name, program in programs:
    began, out, errors = time.process_time(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            program()
        except Torch:
            said[name] = [errors.getvalue(), out.getvalue(), time.process_time() - began]
        except SystemExit as end:
            said[name] = [str(end.code), "", 0]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """By command line: what it had written to stderr and stdout when it imported torch, and after which time."""
    folder = tmp_path_factory.mktemp("here")
    data = Path(__file__).parents[1] / "data"
    subprocess.run(["cp", "-R", data / "emoji-set", folder], check=True)
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH], input=json.dumps(LINES), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", [*LINES, "dpo", "distill"])
def test_a_program_says_what_it_loads_before_it_imports_torch(said: dict[str, list], line: str) -> None:
    errors, out, seconds = said[line]
    expected = "Loading the rewards …" if line == "reward list" else "Loading torch and diffusers …"
    assert (errors, out) == (f"{expected}\n", "")
    assert seconds < 2


def test_the_library_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    stage("one")
    with stages_shown():
        stage("two")
    with stages_shown(shown=False):
        stage("three")
    stage("four")
    assert capsys.readouterr() == ("", "two\n")


def test_items_are_counted_on_a_terminal_of_a_program_only(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    items = range(3)
    with stages_shown():
        assert counted(items, "steps") is items
    written.isatty = lambda: True  # type: ignore[method-assign]
    assert counted(items, "steps") is items
    with stages_shown():
        assert list(counted(items, "steps")) == [0, 1, 2]
    assert "steps" in written.getvalue()
