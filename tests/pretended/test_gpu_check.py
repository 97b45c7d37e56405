"""scripts/gpu_check on the pretended device, in processes of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOES_NOT_FIT = 0.3  # seconds, in which no training ends


def check(*options):
    """The launcher without its environment, which is this one."""
    launcher = (ROOT / "scripts" / "gpu_check").read_text()
    (module,) = re.findall(r'exec "\$python" -m (\S+) "\$@"', launcher)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    wide = [f"--limit={letter}=400" for letter in "abcd"]  # what else runs beside the tests takes time
    command = [sys.executable, "-m", module, *wide, "--time_limit", "550", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=580)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("check") / "results.json"


@pytest.fixture(scope="module")
def first(output):
    """All parts, of which one is over its limit."""
    return check("--pretend", "--output", output, "--limit", f"e={DOES_NOT_FIT}"), json.loads(output.read_text())


def test_a_part_over_its_limit_is_reported_and_the_others_pass(first):
    done, results = first
    parts = dict(results["parts"])
    late = parts.pop("e")
    assert (late["status"], late["reason"]) == ("over its limit", f"killed after {DOES_NOT_FIT} s")
    assert {name: part for name, part in parts.items() if part["status"] != "passed"} == {}
    assert {name[0] for name in parts} == set("abcd")
    assert done.returncode == 1
    assert f"e: over its limit, killed after {DOES_NOT_FIT} s" in done.stdout.splitlines()
    assert re.search(r"^\[1/\d+\] a: passed in [\d.]+ s; \d+ s left$", done.stdout, re.MULTILINE)


def test_the_table_has_ratios_to_three_baselines_and_all_loops_of_training(first):
    done, results = first
    for model in ("sd15", "sdxl", "sd35", "flux"):
        assert re.search(rf"^\| {model} \| 1 \| 2 (\| [\d.]+ ){{9}}\|$", done.stdout, re.MULTILINE)
    for method in ("ddpo-pytorch", "SPO", "Flow-GRPO"):
        assert f"| {method} |" in done.stdout
    assert (results["pretended"], results["machine"][:9]) == (True, "pretended")
    assert results["parts"]["d-training"]["result"]["operators"] > 1000


def test_what_is_left_is_run_by_the_same_command_and_then_nothing(first, output):
    resumed = check("--pretend", "--output", output)
    assert re.findall(r"^\[\S+\] (\S+): (\S+)", resumed.stdout, re.MULTILINE) == [("e", "passed")]
    assert "the adapter is equal to the bit" in resumed.stdout
    assert resumed.returncode == 0
    before = output.read_bytes()
    again = check("--pretend", "--output", output)
    assert (again.returncode, output.read_bytes()) == (0, before)
    assert not re.search(r"^\[", again.stdout, re.MULTILINE)
