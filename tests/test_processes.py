"""Trainings end with the command that started them, however it ends, and so does all that they started."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from stepfuse.scripts.recipes.supervisor import SECONDS
from stepfuse.scripts.recipes.training import SUPERVISOR

# A launcher that starts a worker in a session of its own, as torch's agent does, which starts another; each writes its
# number. The worker takes no notice of SIGTERM.
LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path

level = int(sys.argv[2])
if level == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1], f"{level}.tmp").write_text(str(os.getpid()))
os.rename(Path(sys.argv[1], f"{level}.tmp"), Path(sys.argv[1], str(level)))
if level < 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], str(level + 1)], start_new_session=True)
time.sleep(600)
"""
# Started as `launch` starts it, without importing torch.
PARENT = """
import subprocess, sys
command = [sys.executable, "-P", *sys.argv[1:]]
with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
    process.wait()
"""


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def family(tmp_path):
    """A parent, and the numbers of the supervisor and three processes below it."""
    program = tmp_path / "launcher.py"
    program.write_text(LAUNCHER.replace("__file__", repr(str(program))))
    command = [sys.executable, "-c", PARENT, str(SUPERVISOR), sys.executable, str(program), str(tmp_path), "0"]
    parent = subprocess.Popen(command)
    files = [tmp_path / str(level) for level in range(3)]
    wait_for(lambda: all(file.exists() for file in files))
    (supervisor,) = psutil.Process(parent.pid).children()
    numbers = [supervisor.pid, *(int(file.read_text()) for file in files)]
    yield parent, numbers
    for pid in (parent.pid, *numbers):
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
    parent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="a process that lost its parent is adopted on Linux only")
@pytest.mark.parametrize("victim", ["parent", "supervisor", "launcher"])
def test_processes_end_with_the_one_that_started_them(family, victim):
    parent, numbers = family
    begun = time.monotonic()
    if victim == "parent":
        parent.kill()
    elif victim == "supervisor":
        os.kill(numbers[0], signal.SIGTERM)
    else:
        os.kill(numbers[1], signal.SIGKILL)  # the training itself is left without a parent
    wait_for(lambda: all(map(gone, numbers)))
    assert time.monotonic() - begun > SECONDS - 0.2  # the one that does not heed SIGTERM had its time


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("", 0), ("os.kill(os.getpid(), 9)", 137)])
def test_the_status_is_that_of_the_command(code, status):
    command = [sys.executable, "-P", str(SUPERVISOR), sys.executable, "-c", f"import os; {code}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(20) == status
