"""Shell completion by argcomplete: what may follow on a command line. Nothing here imports torch.

`eval "$(register-python-argcomplete stepfuse)"` enables it.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stepfuse.configs import FOLDER
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.names import embedded_sets, prompt_set_names, reward_names

Completer = Callable[..., Iterable[str]]


def one_of(known: Iterable[str] | Callable[[], Iterable[str]], *suffixes: str) -> Completer:
    """Names, and files with one of some suffixes."""

    def completer(prefix: str, **_: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        found = known() if callable(known) else known
        return [*found, *(FilesCompleter(suffixes)(prefix) if suffixes else ())]

    return completer


def several(known: Iterable[str]) -> Completer:
    """Names separated by commas, each once."""

    def completer(prefix: str, **_: Any) -> list[str]:
        before, comma, _last = prefix.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in known if name not in given]

    return completer


def configs(folder: str) -> Completer:
    """Packaged configurations of a folder, and YAML files."""
    return one_of(lambda: [f"{folder}/{file.stem}" for file in sorted((FOLDER / folder).glob("*.yaml"))], "yaml", "yml")


rewards = one_of(reward_names, "py", "yaml", "yml")
prompt_sets = one_of(prompt_set_names, "txt")


def adapter_sets(prefix: str, **_: Any) -> list[str]:
    """Names of embedded sets, and folders that are adapter sets or may contain one."""
    from argcomplete.completers import DirectoriesCompleter

    return [*embedded_sets(), *DirectoriesCompleter()(prefix)]


def objectives(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of the objectives of the set that is given before."""
    try:
        return list(check_set(Path(str(getattr(parsed_args, "set", None)))) or ())
    except ValueError:
        return []


def weights(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """`A=` for each objective of the set that has no weight yet."""
    before, comma, _last = prefix.rpartition(",")
    given = [part.partition("=")[0] for part in before.split(",")]
    return [f"{before}{comma}{name}=" for name in objectives(prefix, parsed_args) if name not in given]
