"""Programs do not search for reference cycles while they import libraries, nor when they end."""

import gc
import subprocess
import sys

import pytest

from stepfuse.data.garbage import without_collection

CYCLE = """
class Node:
    def __del__(self):
        print("collected")

node = Node()
node.itself = node
"""
ENDS = "from stepfuse.data.garbage import end_without_collection as end; end(); end()\n"


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_meanwhile_and_what_is_there_then_never(fails):
    frozen, kept = gc.get_freeze_count(), []
    try:
        with without_collection():
            assert not gc.isenabled()
            kept += ([] for _ in range(1000))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept) > frozen


def test_a_program_that_does_not_collect_goes_on_not_to():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("begin", "written"), [("", "collected\n"), (ENDS, "")])
def test_a_program_ends_without_a_last_collection(begin, written):
    done = subprocess.run([sys.executable, "-c", begin + CYCLE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, written, "")


@pytest.mark.parametrize("program", [True, False])
def test_a_program_imports_the_libraries_so_and_the_library_does_not(program):
    """The library leaves the collector of the program that uses it alone."""
    code = (
        "import gc, sys\nfrom stepfuse.data.stages import import_libraries, stages_shown\n"
        f"with stages_shown(shown={program}):\n    import_libraries()\n"
        "print('diffusers' in sys.modules, gc.get_freeze_count() > 100_000, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{program} {program} True\n")
    assert done.stderr == "Loading torch and diffusers …\n" * program


def test_the_command_line_ends_so():
    program = f"{CYCLE}\nfrom stepfuse.scripts.cli.main import main\nmain(['--version'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("stepfuse ")
    assert "collected" not in done.stdout
