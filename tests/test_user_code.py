"""Python files of the user: what `python path/to/file.py` runs, `path/to/file.py:function` runs."""

import multiprocessing
import pickle
import sys

import pytest
import torch

from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.user_code import load_function
from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings
from tests.fixtures_tiny import refused

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weights:
    red: float = 1.0

def redness(images, prompts):
    return Weights().red * images[:, 0].mean((1, 2))
"""


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    """What is appended to the path by one test is not there for the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def load(folder, name="reward", function="f"):
    return load_function(str(folder / f"{name}.py"), function)


def test_a_file_may_hold_dataclasses_with_postponed_annotations(tmp_path):
    write(tmp_path, settings=DATACLASS)
    reward = load_reward(f"{tmp_path / 'settings.py'}:redness")
    assert reward(torch.ones(2, 3, 4, 4), ["", ""]).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["helper", "data", "rewards", "stepfuse", "datasets", "statistics"])
def test_modules_beside_the_file_are_imported_whatever_is_installed_or_loaded(name, tmp_path):
    import statistics

    import datasets

    write(tmp_path, reward=f"import {name}\ndef f(): return {name}.mine()", **{name: "def mine(): return 'mine'"})
    assert load(tmp_path)() == "mine"
    assert sys.modules["datasets"] is datasets  # nobody else's import is changed
    assert sys.modules["statistics"] is statistics
    assert statistics.mean([1, 3]) == 2


def test_imports_within_functions_find_the_modules_beside_the_file(tmp_path, monkeypatch):
    lazy = "def f():\n    from settings import VALUE\n    import parts.one as one\n    return VALUE, one.VALUE"
    write(tmp_path / "a", reward=lazy, settings="VALUE = 'a'")
    write(tmp_path / "a" / "parts", __init__="", one="from .two import VALUE", two="VALUE = 'part'")
    # The folder of a program that is run, such as train/, comes first on the path and has a settings.py.
    monkeypatch.syspath_prepend(str(write(tmp_path / "program", settings="VALUE = 'program'")))
    assert load(tmp_path / "a")() == ("a", "part")


def test_files_and_neighbours_of_the_same_names_in_two_folders_are_apart(tmp_path):
    for folder in ("a", "b"):
        text = "from helper import VALUE\ndef f():\n    import helper\n    return VALUE, helper.VALUE"
        write(tmp_path / folder, reward=text, helper=f"VALUE = {folder!r}")
    one, other = load(tmp_path / "a"), load(tmp_path / "b")
    assert (one(), other(), one()) == (("a", "a"), ("b", "b"), ("a", "a"))


def test_import_statements_of_every_form_mean_what_they_mean_to_python(tmp_path):
    text = """
import importlib
import os.path
import package.inner
import package.inner as alias
from package import inner, VALUE
from helper import *
import reward

def f():
    same = package.inner is alias is inner
    found = importlib.import_module("helper").STARRED
    return same, VALUE, STARRED, found, reward.f is f, os.path.sep, __name__ == "__main__"

if __name__ == "__main__":
    raise SystemExit("run as a program")
"""
    write(tmp_path, reward=text, helper="STARRED = 3\n_hidden = 4")
    write(tmp_path / "package", __init__="VALUE = 2", inner="")
    assert load(tmp_path)() == (True, 2, 3, 3, True, "/", False)


def test_a_folder_without_init_does_not_replace_an_installed_module(tmp_path):
    write(tmp_path, reward="import wave, parts.one\ndef f(): return wave.__file__, parts.one.VALUE")
    write(tmp_path / "wave", x="")
    write(tmp_path / "parts", one="import helper\nVALUE = helper.VALUE")
    write(tmp_path, helper="VALUE = 5")
    file, value = load(tmp_path)()
    assert not file.startswith(str(tmp_path))
    assert value == 5


def test_what_a_file_defines_is_pickled_and_sent_to_spawned_processes(tmp_path):
    text = """
from dataclasses import dataclass
from helper import Box

@dataclass
class Weights:
    red: float

def boxed(value):
    return Box(Weights(value)), __name__

def weights():
    return Weights
"""
    write(tmp_path, reward=text, helper="class Box:\n    def __init__(self, held): self.held = held")
    boxed = load(tmp_path, function="boxed")
    copy, _ = pickle.loads(pickle.dumps(boxed(2.0)))
    assert copy.held == load(tmp_path, function="weights")()(2.0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (sent, name), (again, _) = pool.map(boxed, [3.0, 4.0])
    assert (sent.held.red, again.held.red) == (3.0, 4.0)
    assert type(sent.held) is load(tmp_path, function="weights")()
    assert name == type(sent.held).__module__  # one name in every process


def test_a_file_is_run_once_and_again_where_it_has_changed(tmp_path):
    write(tmp_path, reward="import helper\nstate = []\ndef f():\n    state.append(helper.VALUE)\n    return state")
    write(tmp_path, helper="VALUE = 1")
    load(tmp_path)()
    assert load(tmp_path)() == [1, 1]
    write(tmp_path, helper="VALUE = 2", reward=(tmp_path / "reward.py").read_text() + "\n# edited")
    assert load(tmp_path)() == [2]


def test_names_that_are_no_identifiers_and_relative_paths_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my-reward", "reward.v2", "für rot"):
        write(tmp_path, **{name: "import helper\ndef f(): return helper.VALUE"}, helper="VALUE = 7")
        found = load_function(f"{name}.py", "f")
        with monkeypatch.context() as context:
            context.chdir("/")
            assert found() == 7


@pytest.mark.parametrize(
    ("files", "culprits"),
    [
        ({"reward": "x = 1\n\nx.y()\n"}, ["reward.py, line 3", "AttributeError"]),
        ({"reward": "def f(:\n  pass"}, ["reward.py, line 1", "SyntaxError"]),
        ({"reward": "import helper", "helper": "\n1 / 0"}, ["helper.py, line 2", "ZeroDivisionError"]),
        ({"reward": "import helper", "helper": "\n\nx = ("}, ["helper.py, line 3", "SyntaxError"]),
        ({"reward": "\nimport nowhere_at_all"}, ["reward.py, line 2", "nowhere_at_all"]),
        ({"reward": "import sys\nsys.exit('usage: reward.py FILE')"}, ["reward.py, line 2", "usage"]),
        ({"reward": "import json\njson.loads('{')"}, ["reward.py, line 2", "JSONDecodeError"]),
        ({"reward": "def redness(): pass"}, ["no function or class 'rednes'", "'redness'"]),
        ({"reward": "rednes = 3"}, ["no function or class 'rednes'"]),
    ],
)
def test_errors_of_a_file_are_one_line_that_names_file_and_line(files, culprits, tmp_path):
    write(tmp_path, **files)
    with refused("reward.py", *culprits):
        load(tmp_path, function="rednes")
    write(tmp_path, reward="def rednes(): return 1", helper="")  # mended, it is loaded
    assert load(tmp_path, function="rednes")() == 1


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "folder.py").mkdir()
    with refused("gone.py"):
        load(tmp_path, "gone")
    with refused("folder.py", "folder"):
        load(tmp_path, "folder")
    with refused("a.py", "a.py:function"):
        load_reward("a.py")
    (tmp_path / "latin.py").write_bytes("x = 'für'\n".encode("latin-1"))
    with refused("latin.py", "SyntaxError"):
        load(tmp_path, "latin")


def test_an_error_of_a_reward_names_the_line_of_the_users_file_that_it_passed_last(tmp_path):
    text = "import helper\n\ndef f(i, prompts):\n    return helper.g()\n\ndef h(i, prompts):\n    return prompts[9]"
    write(tmp_path, reward=text, helper="import math\n\ndef g():\n    return math.sqrt(-1)")
    pixels = torch.zeros(1, 3, 2, 2)
    for function, culprits in {"f": ["helper.py, line 4", "math domain error"], "h": ["IndexError", "line 7"]}.items():
        with refused("reward.py", *culprits):
            score(load(tmp_path, function=function), pixels, ["a"], name="reward.py:f")
    with pytest.raises(ValueError, match=r"failed: ZeroDivisionError: [^(]*\Z"):  # of no file of the user
        score(lambda images, prompts: 1 / 0, pixels, ["a"])


WORKER = """
from __future__ import annotations
import pickle
from dataclasses import dataclass
from messages import SCALE  # the worker has a messages.py, too

@dataclass
class Weights:
    red: float

def redness(images, prompts):
    import process  # and a process.py
    weights = pickle.loads(pickle.dumps(Weights(SCALE * process.SCALE)))
    print("geröteter 夜空")
    return weights.red * images[..., 0].mean((1, 2)) / 255
"""


def test_a_worker_runs_a_file_as_python_does(tmp_path):
    write(tmp_path, reward=WORKER, messages="SCALE = 2", process="SCALE = 5")
    reward = WorkerReward(WorkerSettings(function="reward.py:redness"), name="mine", folder=tmp_path)
    assert reward(torch.ones(1, 3, 4, 4), [""]).tolist() == [10]
    reward.close()


def test_a_worker_names_the_line_of_an_error_and_the_nearest_function(tmp_path):
    write(tmp_path, reward="import helper\ndef redness(i, p): pass", helper="\n1 / 0", other="def redness(i, p): pass")
    with refused("ZeroDivisionError", "helper.py, line 2"):
        WorkerReward(WorkerSettings(function="reward.py:redness"), name="mine", folder=tmp_path)(
            torch.ones(1, 3, 4, 4), [""]
        )
    with refused("'rednes'", "'redness'"):
        WorkerReward(WorkerSettings(function="other.py:rednes"), name="mine", folder=tmp_path)(
            torch.ones(1, 3, 4, 4), [""]
        )
