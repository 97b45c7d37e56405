"""Build what a release uploads, install it where no checkout is, and use it there as a user would.

Each part prints one line with its time. Its output goes to a log, of which the end is shown if the part fails. The
exit status is 1 if any part failed. Whatever happens, all that was made is deleted at the end, without --keep.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from stepfuse.data.names import nearest
from stepfuse.scripts.release.commands import COMMANDS, NEEDS
from stepfuse.scripts.release.environment import install, install_beside, install_sdist, make_environment
from stepfuse.scripts.release.packages import Packages, build_packages, check_wheel
from stepfuse.scripts.release.processes import CommandFailed, Shell, clean_environment

ROOT = Path(__file__).parents[2]
SDIST_VERSION = "import stepfuse, importlib.metadata as m; assert stepfuse.__version__ == m.version('stepfuse')"


class Report:
    """Runs the parts one after another, and prints a line for each."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed = 0

    def part(self, name: str, shell: Shell, work: Callable[[], object]) -> bool:
        """Whether the part passed; what `work` returns, if it is a text, stands behind its time."""
        began = time.monotonic()
        shell.note(f"== {name}")
        start = shell.log.stat().st_size
        try:
            found = work()
        except (CommandFailed, OSError) as error:
            self.failed.append(name)
            print(f"{name:10} FAILED after {time.monotonic() - began:.1f} s: {error}")
            print("".join(f"    {line}\n" for line in shell.tail(start)), end="", flush=True)
            return False
        self.passed += 1
        more = f": {found.strip()}" if isinstance(found, str) else ""
        print(f"{name:10} passed in {time.monotonic() - began:.1f} s{more}", flush=True)
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where every part has passed."""
    given = _parser().parse_args(arguments)
    chosen = _chosen(given.parts)
    if given.wheel is not None and not given.wheel.is_file():
        raise ValueError(f"--wheel {given.wheel} does not exist; expected the file of a wheel")
    if given.wheel is not None:
        check_name(given.wheel)
    if given.output is not None:
        check_output(given.output)
    if given.venv is not None:
        make_environment(given.venv.absolute(), with_pip=not given.no_install)  # refuses another folder at once
    folder = Path(tempfile.mkdtemp(prefix="stepfuse-release-"))
    began = time.monotonic()
    try:
        report = Report()
        check(folder, report, given, chosen)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            print("interrupted" if given.keep else "interrupted; what was made is deleted", file=sys.stderr)
        raise
    finally:
        if given.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    verdict = f"FAILED: {', '.join(report.failed)}; {report.passed}" if report.failed else f"all {report.passed} parts"
    print(f"== {verdict} passed in {time.monotonic() - began:.0f} s", flush=True)
    return int(bool(report.failed))


def check(folder: Path, report: Report, given: argparse.Namespace, chosen: Sequence[str]) -> None:
    """Build, install, and run the commands that were chosen; without a package or an environment, nothing more."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    shell = Shell(folder=folder, log=folder / "log.txt", environment=outside)  # with pip's own configuration
    packages = Packages(wheel=given.wheel.absolute(), sdist=None) if given.wheel else None

    def build() -> None:
        nonlocal packages
        packages = build_packages(ROOT, folder, shell)

    if packages is None and not report.part("packages", shell, build):
        return
    assert packages is not None
    wheel, sdist = packages.wheel, packages.sdist
    sound = report.part("wheel", shell, lambda: check_wheel(wheel))
    if given.output is not None and sound:
        given.output.mkdir(parents=True, exist_ok=True)
        for file in filter(None, (wheel, sdist)):
            shutil.copy(file, given.output)
    if given.build_only:
        return
    venv = (given.venv or folder / "venv").absolute()
    if given.no_install:
        installed = report.part("install", shell, lambda: install_beside(wheel, venv, shell))
    else:
        constraints = ROOT / "configs" / "constraints.txt"
        installed = report.part("install", shell, lambda: install(wheel, venv, constraints=constraints, shell=shell))
    if not installed:
        return
    work = folder / "work"
    work.mkdir()
    programs = venv / ("Scripts" if os.name == "nt" else "bin")
    user = replace(shell, folder=work, environment=clean_environment(programs, folder / "home"))
    if sdist is not None and not given.no_install:

        def use_sdist() -> None:
            python = install_sdist(sdist, folder / "venv-sdist", shell)
            replace(user, environment=outside).run([str(python), "-c", SDIST_VERSION])

        report.part("sdist", shell, use_sdist)
    for name in chosen:
        if NEEDS.get(name) in report.failed:
            print(f"{name:10} not run, as {NEEDS[name]} failed", flush=True)
            continue
        report.part(name, user, lambda name=name: COMMANDS[name](user))  # type: ignore[misc]


def check_name(wheel: Path) -> None:
    """Raise ValueError for a file that pip would not take for a wheel of stepfuse."""
    if not (wheel.name.startswith("stepfuse-") and wheel.suffix == ".whl"):
        raise ValueError(
            f"--wheel {wheel} is no wheel of stepfuse; expected a file such as stepfuse-0.1.0-py3-none-any.whl"
        )


def check_output(folder: Path) -> None:
    """Raise ValueError for a folder that cannot be made, as a file is in its place."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--output {folder}: {place} is a file; expected a folder, or a new one")


def _chosen(text: str) -> list[str]:
    """The commands to run, in their order, with those that they need."""
    if not text:
        return [*COMMANDS]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--parts {text!r} names nothing; expected some of {', '.join(COMMANDS)}")
    for name in names:
        if name not in COMMANDS:
            raise ValueError(f"--parts {name!r}; expected some of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    names += [NEEDS[name] for name in names if name in NEEDS]
    return [name for name in COMMANDS if name in names]


def _parser() -> argparse.ArgumentParser:
    description = "Check that what would be released works where no checkout is."
    parser = argparse.ArgumentParser(prog="scripts/release_check", description=description, allow_abbrev=False)
    text = "Check this wheel instead of building sdist and wheel from the files of the repository."
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=text)
    text = "Take all dependencies from the environment that runs the check, which is quick, instead of installing them."
    parser.add_argument("--no_install", "--no-install", action="store_true", help=text)
    text = "Environment to install into, which is kept and can be used again (default: a new one, deleted at the end)."
    parser.add_argument("--venv", type=Path, metavar="DIR", help=text)
    text = f"Run some of the commands only, separated by commas: {', '.join(COMMANDS)} (default: all)."
    parser.add_argument("--parts", default="", metavar="NAMES", help=text)
    text = "Build the packages and check what is in them, and do not install them."
    parser.add_argument("--build_only", "--build-only", action="store_true", help=text)
    text = "Folder that the packages are copied to, if what is in them is right."
    parser.add_argument("--output", type=Path, metavar="DIR", help=text)
    text = "Keep the folder with the packages, the outputs of the commands and the log."
    parser.add_argument("--keep", action="store_true", help=text)
    return parser


def _terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
