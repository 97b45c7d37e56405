"""Arguments of the command line: how they are spelled, explained and refused, all of it without torch."""

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from typing import get_args

import pytest

from stepfuse.fuse.backbones.guidance import GUIDANCE
from stepfuse.fuse.rules.options import RULE_OPTIONS
from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.baselines import sampling
from stepfuse.scripts.benchmark import settings
from stepfuse.scripts.benchmark.rewards import OURS
from stepfuse.scripts.benchmark.sampling import check_rules
from stepfuse.scripts.benchmark.settings import NOT_MEASURED, SamplingBenchmark
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.main import make_parser, parse
from stepfuse.scripts.cli.parser import Number


def leaves(parser, *names):
    """Every command that can be run, with its parser."""
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in subparsers:
        for name, child in action.choices.items():
            yield from leaves(child, *names, name)
    if not subparsers:
        yield " ".join(names), parser


COMMANDS = dict(leaves(make_parser()))
OPTIONS = [(name, action) for name, parser in COMMANDS.items() for action in parser._actions if action.dest != "help"]
IDS = [f"{name} {action.dest}" for name, action in OPTIONS]


def example(parser):
    """The arguments of a command's example."""
    return shlex.split(parser.epilog.partition("example:\n")[2].strip())[1:]


# What is known without torch.


def test_names_that_are_known_without_torch_are_those_of_the_library():
    assert ("separate", *sampling.BASELINES) == settings.BASELINES
    assert tuple(OURS) == settings.ORIGINALS
    assert declare.GUIDANCE == GUIDANCE
    assert get_args(settings.DType) == declare.DTYPES


def test_the_options_of_a_rule_that_are_flags_are_those_it_inherits():
    for rule, options in RULE_OPTIONS.items():
        assert issubclass(RULES[rule], options)
        assert {f.name for f in dataclasses.fields(options)} <= {a.dest for a in COMMANDS["sample"]._actions}


def test_rules_that_fuse_any_adapters_without_rewards_are_measured_and_no_other():
    check_rules([rule for rule in RULES if rule not in NOT_MEASURED])
    for rule in NOT_MEASURED:
        with pytest.raises(ValueError, match=f"rule {rule} is not measured"):
            check_rules((rule,))
    with pytest.raises(ValueError, match="no fusion rule 'sum'"):
        SamplingBenchmark(model="emoji", rules=("sum",))


def test_a_module_is_imported_for_its_own_command_only():
    """The help of all commands imports none, and that of one command only its module."""
    for words, expected in (
        (["--help"], set()),
        (["sample", "--help"], {"sample"}),
        (["set", "show", "-h"], {"set_show"}),
    ):
        code = f"""
import contextlib, sys
from stepfuse.scripts.cli.main import COMMANDS, main
with contextlib.suppress(SystemExit):
    main({words!r})
loaded = {{name.rpartition(".")[2] for name in sys.modules if name.startswith("stepfuse.scripts.cli.")}}
print(loaded & {{name.replace(" ", "_") for name in COMMANDS}}, "torch" in sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"{expected} False"


# Help.


@pytest.mark.parametrize(("command", "action"), OPTIONS, ids=IDS)
def test_every_option_is_explained_in_whole_sentences_with_its_default(command, action):
    text = COMMANDS[command]._get_formatter()._expand_help(action)
    assert len(text.split()) > 3 or not action.option_strings
    assert text[0].isupper() or text[0].isdigit() or text.split(":")[0] in (action.choices or [])
    assert text.endswith(".")
    if not action.option_strings:
        return
    assert "default" in text or (action.required and re.search("[Rr]equired", text))
    plain = isinstance(action.default, int | float | str) and not isinstance(action.default, bool)
    if plain and action.default != "":
        assert f"default: {action.default}" in text
    assert action.default is not None or "None" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_one_spelling_of_each_flag_and_a_short_usage(command, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command].parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert not re.search(r"--\w+-\w", text)
    usage = text.splitlines()[0]
    assert usage.startswith(f"usage: stepfuse {command}")
    required = {a.option_strings[0] for a in COMMANDS[command]._actions if a.option_strings and a.required}
    assert set(re.findall(r"--\w+", usage)) == required


# Spelling.


@pytest.mark.parametrize("command", COMMANDS)
def test_dashes_and_underscores_are_the_same_in_every_flag(command):
    words = example(COMMANDS[command])
    for name, action in OPTIONS:
        if name == command and action.option_strings:
            usual = {"device": "cpu", "candidates": "2", "requests": "2", "rule": "soup"}.get(action.dest, "1")
            value = [] if action.nargs == 0 else [str(next(iter(action.choices or [usual])))]
            flag = action.option_strings[0]
            dashed = "--" + flag.removeprefix("--").replace("_", "-")
            expected = vars(parse([*words, flag, *value]))
            assert vars(parse([*words, dashed, *value])) == expected
            if value:
                assert vars(parse([*words, f"{dashed}={value[0]}"])) == expected


def test_a_dash_in_a_value_stays():
    parsed = parse(["sample", "emoji", "--prompt=--a-b", "--output", "a-b.png", "--negative-prompt", "--two-words x"])
    assert (parsed.prompt, str(parsed.output), parsed.negative_prompt) == (["--a-b"], "a-b.png", "--two-words x")
    assert str(parse(["set", "show", "--", "--my-set"]).set) == "--my-set"


def test_a_negative_number_with_an_exponent_is_the_value_of_a_flag():
    assert parse(["sample", "emoji", "--prompt", "x", "--guidance_scale", "-1e-1"]).guidance_scale == -0.1
    assert parse(["sample", "emoji", "--prompt", "x", "--guidance_scale", "-2E-3"]).guidance_scale == -0.002


# Refusals, by a process that has no torch yet.

WRONG = {  # what is typed → what the answer names
    "sampel emoji": ["'sampel'", "'sample'"],
    "set shw emoji": ["'shw'", "'show'"],
    "benchmark trainin": ["'trainin'", "'training'"],
    "benchmark sampling": ["--architecture"],
    "benchmark training --device cuda:1": ["--device is 'cuda:1'", "cuda"],
    "sample emoji --promt x": ["--promt", "'--prompt'"],
    "sample emoji --prompt x --neg y": ["--neg", "'--negative_prompt'"],
    "sample emoji --prompt x --guidance-scal 2": ["--guidance_scal", "'--guidance_scale'"],
    "evaluate emoji --conf x": ["--conf", "'--config'"],
    "set import a --objektive b": ["--objektive", "'--objective'"],
    "--versoin": ["--versoin", "'--version'"],
    "sample emoji": ["--prompt"],
    "sample emoji --prompt x --steps two": ["--steps", "'two'"],
    "sample emoji --prompt x --strength strong": ["--strength", "'strong'", "such as 1.0"],
    "serve emoji --port abc": ["--port", "'abc'", "such as 8000"],
    "demo --objectives lightness": ["--objectives", "'lightness'", "expected one of 2, 3"],
    "sample emoji --prompt x --steps 0": ["--steps 0", "1 or more"],
    "sample emoji --prompt x --steps -3": ["--steps -3"],
    "sample emoji --prompt x --strength nan": ["--strength nan"],
    "sample emoji --prompt x --seed -1": ["--seed -1"],
    "sample emoji --prompt x --seed 18446744073709551616": ["--seed", "2^64"],
    "sample emoji --prompt x --rows_at_once 0": ["--rows_at_once 0"],
    "sample emoji --prompt ' '": ["--prompt"],
    "sample emoji --prompt x --output there.png": ["there.png", "--overwrite"],
    "sample emoji --prompt x --output file.txt": ["file.txt"],
    "sample emoji --prompt x --output there.png/new.png": ["there.png is a file; expected a folder"],
    "sample emoji --prompt x --weights alignment": ["'alignment'"],
    "sample emoji --prompt x --weights alignement=1": ["'alignement'", "'alignment'"],
    "sample emoji --prompt x --weights alignment=0": ["alignment=0"],
    "sample emoji --prompt x --weights alignment=inf": ["alignment=inf"],
    "sample emoji --prompt x --strength -inf": ["--strength -inf", "expected"],
    "sample emoji --prompt x --weights alignment=0.5@0.5-0.2": ["0.5@0.5-0.2"],
    "sample emoji --prompt x --rule prodct": ["'prodct'", "'product'"],
    "sample emoji --prompt x --rule soup --gate 0.4": ["'gate'", "product"],
    "sample emoji --prompt x --guidance_interval 0.8-0.2": ["0.8-0.2"],
    "sample emoji --prompt x --guidance_interval half": ["'half'"],
    "sample emoji --prompt x --guidance ful": ["'ful'", "'full'"],
    "sample emoji --prompt x --dtype float23": ["'float23'", "'float32'"],
    "sample emoji --prompt x --device cdua": ["'cdua'", "'cuda'"],
    "sample emoij --prompt x": ["'emoij'", "'emoji'"],
    "sample ./outputs/sets --prompt x": ["outputs/sets", "'outputs/set'"],
    "sample outputs/deeper/set --prompt x": ["outputs/deeper/set"],
    "set show empty": ["empty", "adapter_set.json"],
    "set show outputs": ["outputs", "the adapter set in it is outputs/set"],
    "set show outputs/deeper/./set": ["outputs/deeper/set"],
    "set show run/set": ["'run/set'", "'run/deep/set'"],
    "set show base": ["'base' is a base model, not an adapter set", "set create"],
    "set show there.png": ["there.png is a file"],
    "set show run/trained": ["in run/trained: it holds adapters, not a set", "set create"],
    "set show stable-diffusion-v1-5": ["is the name of the base model", "not of an adapter set"],
    "set create full --adapter outputs/set": ["full", "--overwrite"],
    "set create new --adapter run": ["no adapter in run", "adapters are in run/trained"],
    "set create new --adapter run/traind": ["no adapter in run/traind", "'run/trained'"],
    "set create new --adapter cut": ["no adapter in cut", "training in cut has not ended", "--resume_from_"],
    "set create new --adapter cut/checkpoint-3": ["training in cut has not ended", "--resume_from_checkpoint latest"],
    "set create new --adapter run/trained/checkpoint-3": ["a checkpoint; what was trained is in run/trained"],
    "set create new --adapter gone": ["gone"],
    "set create new --adapter empty": ["empty", "set import"],
    "set profile emoji": ["'emoji'", "pull"],
    "set card OWNER/NAME": ["OWNER/NAME", "pull"],
    "set import gone.safetensors --objective a --eta 1 --set new": ["gone.safetensors"],
    "set import there.png --objective a/b --eta 1 --set new": ["'a/b'"],
    "set export emoji alignment --output a.bin": ["a.bin", ".safetensors"],
    "set export emoji alignment --output there.png": ["there.png", ".safetensors"],
    "set export emoji --output there.png": ["there.png is a file"],
    "benchmark emoji --adapters 0,1": ["--adapters is 0,1"],
    "benchmark emoji --mode reduce-overhead": ["--mode", "--compile"],
    "benchmark training --candidates 1": ["--candidates 1"],
    "benchmark training --timestep_fraction 0": ["--timestep_fraction 0"],
    "set create new --adapter outputs/set --reference_eta 7": ["--reference_eta 7", "0 to 1"],
    "set import a.safetensors --objective a --eta 2 --set new": ["--eta 2"],
    "set export emoji alinment": ["'alinment'", "'alignment'"],
    "set export emoji --format kohia": ["'kohia'", "'kohya'"],
    "set merge emoji --output lora.bin": ["lora.bin", ".safetensors"],
    "set profile outputs/set --prompts emoji-holdout": ["'emoji-holdout'", "'emoji-heldout'"],
    "set profile outputs/set --prompts emoji:0": ["emoji:0"],
    "reward score imagereward --images empty --prompts there.png": ["'imagereward'", "'image_reward'"],
    "reward score gone.py:f --images empty --prompts there.png": ["gone.py"],
    "reward score colourfulness --images gone --prompts there.png": ["gone"],
    "reward score colourfulness --images empty --prompts gone": ["gone"],
    "reward serve colorfulness": ["'colorfulness'", "'colourfulness'"],
    "reward serve colourfulness --port 70000": ["--port 70000"],
    "evaluate emoji": ["--config"],
    "evaluate emoji --config emogi": ["'emogi'", "'eval/emoji'"],
    "evaluate emoji --config eval/emoji --output_dir full": ["full", "--overwrite"],
    "evaluate --world gm": ["'gm'", "'gmm'"],
    "evaluate emoji --world gmm": ["--world"],
    "build emojis": ["'emojis'", "sets/emoji"],
    "benchmark": ["--architecture"],
    "benchmark emoji --rules product,swich": ["--rules", "'swich'", "'switch'"],
    "benchmark emoji --rules kl": ["--rules is kl", "without rewards"],
    "benchmark emoji --guidance_scale 1": ["--guidance_scale 1"],
    "benchmark rewards --images empty": ["--images and prompts go together"],
    "benchmark emoji --rivals seperate": ["'seperate'", "'separate'"],
    "benchmark emoji --adapters 1,two": ["'1,two'"],
    "benchmark rewards --rewards pikscore": ["'pikscore'", "'pickscore'"],
    "benchmark training --model emojy": ["'emojy'", "'emoji'"],
    "benchmark training --algorithms dpoo": ["'dpoo'", "'dpo'"],
    "pull OWNER/NAME full": ["full", "--overwrite"],
    "demo --output_dir full": ["--output_dir full", "--overwrite", "others stay"],
    "demo --output_dir begun --seed 2": ["--output_dir begun", "--seed 1", "--overwrite"],
    "serve emoji --host 0.0.0.0": ["--host 0.0.0.0", "--token_file"],
    "serve emoji --token_file gone": ["token file gone"],
    "build wrong.yaml": ["wrong.yaml", "'objektives'", "'objectives'"],
}
ATTEMPT = """
import contextlib, io, json, shlex, sys, time
from stepfuse.scripts.cli.main import main
answers = []
for line in json.load(sys.stdin):
    began, errors = time.process_time(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main(shlex.split(line))
        told, status = "", 0
    except SystemExit as stop:
        told, status = (errors.getvalue(), stop.code) if isinstance(stop.code, int) else (stop.code, 1)
    answers.append([told, status, "torch" in sys.modules, time.process_time() - began])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each wrong line is answered with, by one process."""
    folder = tmp_path_factory.mktemp("here")
    for name in ("empty", "full", "base", "outputs/set", "run/deep/set", "run/trained/a"):
        (folder / name).mkdir(parents=True)
    for name in ("outputs/set", "run/deep/set"):
        (folder / name / "adapter_set.json").write_text('{"format_version": 1, "adapters": [{"name": "a"}]}')
    for name in ("begun", "cut/checkpoint-3", "run/trained/checkpoint-3"):
        (folder / name).mkdir(parents=True)
    (folder / "begun/demo.json").write_text('{"objectives": 2, "seed": 1, "quick": false, "training": "0"}')
    (folder / "wrong.yaml").write_text("objektives: []\n")
    for name in ("there.png", "full/mine.txt", "run/trained/a/objective.json", "base/model_index.json"):
        (folder / name).write_text("precious")
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPT], input=json.dumps(list(WRONG)), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before
    return dict(zip(WRONG, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_argument_is_refused_before_torch_is_imported(answers, line):
    told, status, torch_imported, seconds = answers[line]
    assert not torch_imported
    assert seconds < 0.8
    assert "Traceback" not in told
    *usage, error = [text for text in told.splitlines() if not text.startswith("All options")]
    assert error.startswith("error: ")
    assert all(culprit in error for culprit in WRONG[line])
    assert status == (2 if usage else 1)
    if usage:
        (shown,) = usage
        command = next((name for name in COMMANDS if line.startswith(name)), line.split()[0])
        assert shown.startswith(f"usage: stepfuse {command if command in COMMANDS else ''}".rstrip())


NUMBERS = {f"{command} {action.dest}": action for command, action in OPTIONS if isinstance(action.type, Number)}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_bounds_is_refused_by_the_name_of_its_option(name):
    flag = NUMBERS[name].option_strings[0]
    bounds = NUMBERS[name].type.bounds
    wrong = [float("nan"), float("-inf"), bounds.least - 1, bounds.above]
    wrong += [float("inf"), bounds.most * 2] if bounds.finite else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{flag} .*; expected "):
            NUMBERS[name].check(value)
    NUMBERS[name].check(2 if bounds.least == 2 else 1)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_example_of_a_number_is_a_valid_value_of_its_option(name):
    """The number after "such as" is accepted, and where there are choices they are those that are listed."""
    action = NUMBERS[name]
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'two'; expected ") as error:
        action.type("two")
    expected = str(error.value).partition("expected ")[2]
    if action.choices:
        assert expected == "one of " + ", ".join(map(str, action.choices))
    elif "such as" in expected:
        value = action.type(expected.partition("such as ")[2])
        action.type.check(value)
        assert value == action.default
    else:
        assert str(action.type.bounds) in expected


def test_the_bounds_of_numbers_are_these():
    found = {}
    for _, action in OPTIONS:
        if isinstance(action.type, Number):
            bounds = action.type.bounds
            found.setdefault(action.dest, set()).add((bounds.least, bounds.above, bounds.most))
    infinity = float("inf")
    others = {
        "seed": (0, -infinity, 2**64 - 1),
        "port": (0, -infinity, 65535),
        "enlarge": (1, -infinity, 64),
        "layers": (0, -infinity, infinity),
        "strength": (0, -infinity, infinity),
        "gate": (0, -infinity, infinity),
        "guidance_scale": (-infinity, -infinity, infinity),
        "eta": (0, -infinity, 1),
        "reference_eta": (0, -infinity, 1),
        "timestep_fraction": (-infinity, 0, 1),
        "time_limit": (-infinity, 0, infinity),
        "grace": (0, -infinity, infinity),
        "rate": (-infinity, 0, infinity),
        "light": (-infinity, 0, infinity),
    }
    for name, bounds in found.items():
        least = 2 if name in ("candidates", "requests") else 1
        assert bounds <= {others.get(name, (1, -infinity, infinity)), (least, -infinity, infinity)}, name
    assert found.keys() > others.keys()


def test_version_is_the_packages(monkeypatch, capsys):
    import importlib.metadata

    with pytest.raises(SystemExit) as stop:
        parse(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"stepfuse {importlib.metadata.version('stepfuse')}\n"
