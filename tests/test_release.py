"""What scripts/release_check finds, and that the built package works where no checkout is."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from stepfuse.scripts.cli.main import parse
from stepfuse.scripts.release.check import Report, main
from stepfuse.scripts.release.commands import DDPO, IMPORTS
from stepfuse.scripts.release.environment import install_beside, write_launcher
from stepfuse.scripts.release.packages import LAYERS, check_metadata, check_same_files, check_wheel, copy_repository
from stepfuse.scripts.release.processes import CommandFailed, Shell, clean_environment
from tests.fixtures_documents import ROOT, blocks
from tests.fixtures_tiny import refused

# In one process, which imports the libraries once: the commands of a file, one a line, and then a training.
SEVERAL = """
import runpy, shlex, sys
from stepfuse.scripts.cli.main import main

for line in open("commands.txt", encoding="utf-8"):
    program, *words = shlex.split(line, comments=True)
    if program == "stepfuse":
        main(words)
    elif program == "python":
        runpy.run_path(words[0])
    else:
        sys.argv = ["ddpo", *words]
        runpy.run_module("stepfuse.train.ddpo", run_name="__main__")
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(folder=tmp_path, log=tmp_path / "log.txt", environment=os.environ)


def commands(language: str = "bash") -> list[str]:
    """Those of PACKAGE.md, which an index of packages shows."""
    return [line for block in blocks("PACKAGE.md", language) for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_package_works_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies at hand, in an environment without the checkout: the commands of PACKAGE.md in small."""
    folder = tmp_path / "work"
    folder.mkdir()
    venv = tmp_path / "venv"
    shell = Shell(folder=folder, log=tmp_path / "log.txt", environment=os.environ)
    install_beside(wheel, venv, shell)
    user = replace(shell, environment=clean_environment(venv / "bin", tmp_path / "home"))
    assert re.fullmatch(r"stepfuse \d+\.\d+\.\d+\n", user.run("stepfuse --version"))
    known = commands()
    (drawn,), (shown,) = (
        [line for line in known if line.startswith(f"stepfuse {name} ")] for name in ("sample emoji-flow", "set show")
    )
    (launched,) = [line for line in known if line.startswith("accelerate launch")]
    program, _, words = launched.partition(" --config ")
    assert program == "accelerate launch --quiet -m stepfuse.train.ddpo"
    small = " ".join(f"--{name} {value}" for name, value in DDPO.items())
    (snippet,) = blocks("PACKAGE.md", "python")
    trained = f"train --config {words} {small} --report_to none"
    (folder / "example.py").write_text(snippet)
    (folder / "commands.txt").write_text("\n".join([drawn, shown, "python example.py", trained]))
    printed = user.run(["python", "-c", IMPORTS + SEVERAL])
    assert (folder / "apple.png").is_file()
    assert "next, make a set" in printed
    assert (folder / "outputs/compressibility/objective.json").is_file()
    assert str(ROOT) not in printed


def test_every_command_of_the_package_page_is_parsed() -> None:
    lines = [shlex.split(line, comments=True) for line in commands() if line.startswith("stepfuse ")]
    assert len(lines) >= 5
    for _, *words in lines:
        if words[-1] != "--help":
            assert callable(parse(words).run)


def test_two_wheels_differ_by_name_or_content(tmp_path: Path) -> None:
    def save(name: str, **files: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file, content in files.items():
                archive.writestr(file, content)
        return tmp_path / name

    first = save("first", a="1", b="2")
    check_same_files(first, save("same", b="2", a="1"))
    for other in (save("changed", a="1", b="3"), save("more", a="1", b="2", c="3"), save("less", a="1")):
        with pytest.raises(CommandFailed, match=f"differs in {'c' if other.name == 'more' else 'b'}$"):
            check_same_files(first, other)


def test_what_does_not_belong_into_a_wheel_is_found(wheel: Path, tmp_path: Path) -> None:
    assert check_wheel(wheel).endswith(" MB")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA")))

    def with_names(changed: list[str]) -> Path:
        file = tmp_path / wheel.name
        with zipfile.ZipFile(file, "w") as archive:
            for name in changed:
                archive.writestr(name, metadata)
        return file

    check_wheel(with_names(names))
    for stray in ("tests/test_a.py", "stepfuse/scripts/gpu/check.py", "stepfuse/__pycache__/a.pyc"):
        with pytest.raises(CommandFailed, match=f"holds {stray}"):
            check_wheel(with_names([*names, stray]))
    for needed in ("stepfuse/configs/sets/emoji.yaml", next(name for name in names if name.endswith("/LICENSE"))):
        with pytest.raises(CommandFailed, match=f"lacks {needed}"):
            check_wheel(with_names([name for name in names if name != needed]))


def test_a_description_stands_alone() -> None:
    head = b"Metadata-Version: 2.4\nName: a\nVersion: 1\nDescription-Content-Type: text/markdown\n\n"
    check_metadata(head + b"[a](https://example.org) and [b](#part)")
    check_metadata(head + b"```\n[a](b.md)\n```\n\n<a href='mailto:a@example.org'>a</a>")
    for link in (
        "![a](docs/a.png)",
        "[a](docs/a.png)",
        "[a][b]\n\n[b]: docs/a.png",
        '<img src="docs/a.png">',
        '<picture><source srcset="docs/a.png"></picture>',
        'In a line: <a href="docs/a.png">a</a>',
    ):
        with pytest.raises(CommandFailed, match=r"relative links.*: docs/a\.png$"):
            check_metadata(head + link.encode())
    with pytest.raises(CommandFailed, match=r"not valid: .*version"):
        check_metadata(head.replace(b"Version: 1", b"Version: one"))


def test_a_part_that_fails_shows_the_end_of_its_log(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    assert report.part("first", shell, lambda: shell.run("echo of the first"))
    failing = ["sh", "-c", "for i in $(seq 100); do echo line $i >&2; done; printf '1 %%\\r50 %%' >&2; exit 3"]
    assert not report.part("second", shell, lambda: shell.run(failing))
    assert (report.passed, report.failed) == (1, ["second"])
    first, second, *shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"first +passed in \d+\.\d s: of the first", first)
    assert re.match(r"second +FAILED after \d+\.\d s: `sh -c .*` ended with status 3$", second)
    assert shown == [f"    line {number}" for number in range(77, 101)] + ["    50 %"]


def test_wrong_arguments_are_answered_in_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    other.write_text("no wheel")
    with refused("--wheel", "missing.whl", "does not exist"):
        main(["--wheel", str(tmp_path / "missing.whl")])
    with refused("other.whl is no wheel of stepfuse"):
        main(["--wheel", str(other)])
    with refused("--parts 'dmo'; expected some of version", "demo"):
        main(["--parts", "version,dmo"])
    with refused("--parts ',' names nothing; expected some of version"):
        main(["--parts", ","])
    for folder in (other, other / "below"):
        with refused(f"--output {folder}: {other} is a file"):
            main(["--output", str(folder)])
    with refused(f"--venv {tmp_path} is no virtual environment"):
        main(["--wheel", str(other.rename(tmp_path / "stepfuse-1-py3-none-any.whl")), "--venv", str(tmp_path)])


def test_an_unpacked_archive_is_copied_without_what_was_made_in_it(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    wanted = {"pyproject.toml", "LICENSE", *(f"{layer}/a.py" for layer in LAYERS), "scripts/cli/page.html"}
    for name in (*wanted, "data/__pycache__/a.pyc", "tests/test_a.py", "outputs/a.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_repository(source, target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == wanted


def test_why_git_cannot_list_the_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").write_text("gitdir: missing\n")
    if shutil.which("git"):
        with refused(f"git cannot list the files of {tmp_path}: fatal: not a git repository: ", "--wheel FILE"):
            copy_repository(tmp_path, tmp_path / "target")
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("git is not installed", "--wheel FILE"):
        copy_repository(tmp_path, tmp_path / "target")


def test_a_launcher_starts_where_paths_have_spaces(tmp_path: Path) -> None:
    """Of an environment that is there, in which a module prints what it is given in place of accelerate."""
    folder = tmp_path / "with spaces"
    (folder / "accelerate/commands").mkdir(parents=True)
    (folder / "accelerate/commands/accelerate_cli.py").write_text("import sys\nmain = lambda: print(sys.argv[1:])\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    write_launcher(folder / "launcher", python)
    command = [folder / "launcher", "launch", "a b", "$c"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "['launch', 'a b', '$c']\n"


@pytest.mark.parametrize("keep", [False, True], ids=["delete", "keep"])
def test_an_interrupted_check_ends_its_processes_and_deletes_its_folder_or_keeps_it(
    keep: bool, wheel: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "stepfuse.scripts.release.check", "--no_install", "--wheel", str(wheel)]
    command += ["--keep"] * keep
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as check:
        end = time.monotonic() + 120
        while not (below := psutil.Process(check.pid).children(recursive=True)):
            assert check.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        check.send_signal(signal.SIGTERM)
        printed, said = check.communicate(timeout=60)
        assert check.returncode == 130
    assert psutil.wait_procs(below, timeout=10)[1] == []
    left = [*tmp_path.iterdir()]
    assert [line for line in printed.splitlines() if line.startswith("kept")] == [f"kept: {folder}" for folder in left]
    assert len(left) == keep
    assert said == ("interrupted\n" if keep else "interrupted; what was made is deleted\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_a_command_starts_ends_the_command(shell: Shell) -> None:
    """A timer interrupts at ever later moments: some before the process is there, and some after.

    One between the opening of the log and its `with` leaves a file that Python closes with a warning.
    """
    others = psutil.Process().children()

    def run(milliseconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)
        shell.run(["sleep", "60"])

    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    try:
        for milliseconds in (0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4, 3.0, 4.0, 100.0):
            with pytest.raises(KeyboardInterrupt):
                run(milliseconds)
            assert psutil.Process().children() == others
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, ignored)
