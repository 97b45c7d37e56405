"""A virtual environment in which a wheel is installed as users install it."""

import os
import sys
import sysconfig
import venv
from pathlib import Path

from stepfuse.scripts.release.processes import Shell


def install(wheel: Path, folder: Path, *, constraints: Path, shell: Shell) -> None:
    """Install a wheel with its server and the tested versions of all dependencies; an environment is reused."""
    python = make_environment(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # torch first and by its pin, as scripts/setup does: the resolver may bring another build with gigabytes of CUDA.
    shell.run([*pip, "--constraint", str(constraints), "torch"])
    shell.run([*pip, "--constraint", str(constraints), f"stepfuse[serve] @ {wheel.as_uri()}"])
    shell.run([*pip, "--force-reinstall", "--no-deps", str(wheel)])  # an earlier build has the same version
    shell.run([str(python), "-m", "pip", "--disable-pip-version-check", "check"])


def install_beside(wheel: Path, folder: Path, shell: Shell) -> None:
    """Install a wheel alone, in an environment that finds all dependencies in the one that runs this.

    They are found by a path, not by the `.pth` files in it, so that an editable install of the checkout is not.
    """
    python = make_environment(folder, with_pip=False)
    paths = {key: sysconfig.get_path(key, vars=_base(folder)) for key in ("purelib", "scripts")}
    here = sysconfig.get_path("purelib")
    Path(paths["purelib"], "dependencies.pth").write_text(f"{here}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    shell.run([*pip, "install", "--quiet", "--no-deps", "--force-reinstall", "--no-warn-script-location", str(wheel)])
    write_launcher(Path(paths["scripts"], "accelerate"), python)


def write_launcher(file: Path, python: Path) -> None:
    """Write the program `accelerate`, which runs in an environment.

    A first line `#!` cannot name a path with spaces. So the shell runs the program, as with pip's own launchers, and
    its second line starts Python, to which that line is a string.
    """
    start = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"
    file.write_text(
        f"{start}import sys\nfrom accelerate.commands.accelerate_cli import main\n\nsys.exit(main())\n",
        encoding="utf-8",
    )
    file.chmod(0o755)


def install_sdist(sdist: Path, folder: Path, shell: Shell) -> Path:
    """Install an sdist without its dependencies, built by pip in isolation; the environment's Python."""
    python = make_environment(folder, with_pip=True)
    shell.run([str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", str(sdist)])
    return python


def make_environment(folder: Path, *, with_pip: bool) -> Path:
    """The Python of an environment, which is made unless it is there.

    Raises:
        ValueError: for a folder that holds something else.
    """
    python = Path(sysconfig.get_path("scripts", vars=_base(folder)), "python")
    if not python.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--venv {folder} is no virtual environment; expected one, or a new folder")
        venv.create(folder, with_pip=with_pip, symlinks=os.name != "nt")
    return python


def _base(folder: Path) -> dict[str, str]:
    return {"base": str(folder), "platbase": str(folder)}
