"""Shell completion by argcomplete: what may follow on a command line. Nothing here imports torch.

`eval "$(register-python-argcomplete stepfuse)"` enables it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stepfuse.configs import FOLDER
from stepfuse.fuse.rules.registry import RULES
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Completer


def one_of(known: Iterable[str], *suffixes: str) -> Completer:
    """Names, and files with one of some suffixes."""

    def completer(prefix: str, **_: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*known, *(FilesCompleter(suffixes)(prefix) if suffixes else ())]

    return completer


def several(known: Iterable[str], suffix: str = "") -> Completer:
    """Names separated by commas, each once, with what follows a name, such as `=` before a number."""

    def completer(prefix: str, **_: Any) -> list[str]:
        before, comma, _last = prefix.rpartition(",")
        given = [part.partition("=")[0] for part in before.split(",")]
        return [f"{before}{comma}{name}{suffix}" for name in known if name not in given]

    return completer


def configs(folder: str) -> Completer:
    return one_of([f"{folder}/{file.stem}" for file in sorted((FOLDER / folder).glob("*.yaml"))], "yaml", "yml")


rewards = one_of(REWARDS, "py", "yaml", "yml")
rules = one_of(RULES, "py")


def adapter_sets(prefix: str, **_: Any) -> list[str]:
    """Names of bundled sets, and folders that are adapter sets or may contain one."""
    from argcomplete.completers import DirectoriesCompleter

    from stepfuse.fuse.sets.manifest import EMBEDDED_SETS

    return [*EMBEDDED_SETS, *DirectoriesCompleter()(prefix)]


def objectives(prefix: str, parsed_args: Arguments, **_: Any) -> list[str]:
    """Names of the objectives of the set that is given before."""
    try:
        return list(check_set(Path(str(getattr(parsed_args, "set", None)))) or ())
    except ValueError:
        return []


def weights(prefix: str, parsed_args: Arguments, **_: Any) -> Iterable[str]:
    """`A=` for each objective of the set that has no weight yet."""
    return several(objectives(prefix, parsed_args), "=")(prefix)
