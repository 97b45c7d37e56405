"""What all commands have in common: help pages, exit statuses, and what is said when one is interrupted."""

import argparse
import os
import re
import shlex
import subprocess
import sys

import pytest

from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.cli.main import main, make_parser, parse

# Help.


def test_help_names_every_rule(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert f"one of {', '.join(RULES)}, or a class in a file" in " ".join(capsys.readouterr().out.split())


def commands(parser, *names):
    """Every command with its parser, the groups among them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*names, name), child
                yield from commands(child, *names, name)


COMMANDS = dict(commands(make_parser()))


def test_there_are_the_commands_that_are_tested_here():
    assert {" ".join(names) for names in COMMANDS} >= {
        "demo",
        "sample",
        "set",
        "set create",
        "set validate",
        "set show",
        "set profile",
        "evaluate",
        "benchmark",
        "benchmark sampling",
        "benchmark rewards",
        "benchmark training",
        "benchmark serve",
        "reward list",
        "reward score",
        "reward serve",
    }


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_can_be_run(names, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*names, "--help"])
    assert stop.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("example:\n")
    program, *arguments = shlex.split(examples.strip())
    assert program == "stepfuse"
    assert " ".join(arguments).startswith(" ".join(names))
    assert callable(parse(arguments).run)


def test_a_failing_command_exits_with_status_1_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stepfuse.scripts.cli.main", "set", "show", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"error: [^\n]*{tmp_path}[^\n]*\n", done.stderr)


@pytest.mark.parametrize("unbuffered", ["0", "1"])
def test_a_reader_of_the_output_that_has_ended_is_no_error(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "stepfuse.scripts.cli.main", "reward", "list"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONUNBUFFERED": "" if unbuffered == "0" else "1"},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "Loading the rewards …\n")


AGAIN = "interrupted; the same command"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "evaluate emoji --config eval/emoji --output_dir out",
            f"{AGAIN} continues from whatever was saved",
        ),
        (
            "demo --output_dir out --overwrite",
            f"{AGAIN} without --overwrite continues from whatever was saved",
        ),
        ("build sets/emoji", f"{AGAIN} continues from whatever was saved"),
        ("reward score compressibility --images . --prompts p --overwrite", "interrupted; the same command continues"),
        ("evaluate --world gmm --output_dir out", "interrupted"),
        ("sample emoji --prompt x", "interrupted"),
    ],
)
def test_an_interrupted_command_tells_how_to_continue_it(line, told, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    words = shlex.split(line)
    parsed = parse(words)
    monkeypatch.setattr(
        "stepfuse.scripts.cli.main.parse", lambda _: argparse.Namespace(**vars(parsed) | {"run": interrupted})
    )
    with pytest.raises(SystemExit, match=r"^130$"):
        main(words)
    (said,) = capsys.readouterr().err.split("\n")[1:-1]
    assert said.startswith(told)
    assert ("continue" in said) == ("continue" in told)
