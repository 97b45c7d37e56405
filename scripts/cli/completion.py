"""Shell completion by argcomplete: what may follow on a command line. Nothing here imports torch.

`eval "$(register-python-argcomplete stepfuse)"` switches it on.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter

from stepfuse.configs import FOLDER
from stepfuse.scripts.cli.choices import (
    BASELINES,
    BENCHMARK_RULES,
    COMPILE_MODES,
    DEVICES,
    EMBEDDED_SETS,
    MODELS,
    ORIGINAL_REWARDS,
    PROMPT_SET_NAMES,
    REWARD_NAMES,
    RULE_NAMES,
)

MANIFEST = "adapter_set.json"
TWO_WORDS = ("benchmark rewards", "benchmark training")  # completed word by word
Completer = Callable[..., Iterable[str]]


def complete(action: argparse.Action, completer: Completer) -> None:
    """Set what argcomplete asks for the values of an argument."""
    action.completer = completer  # type: ignore[attr-defined]


def autocomplete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit, if it is the shell that asks; otherwise do nothing."""
    argcomplete.autocomplete(parser, always_complete_options=False, exclude=TWO_WORDS)


def adapter_sets(prefix: str, parser: argparse.ArgumentParser, **_: Any) -> list[str]:
    """Names of embedded sets, and folders that are adapter sets or may lead to one."""
    benchmarks = ["rewards", "training"] if parser.prog.endswith(" benchmark") else []
    return [*EMBEDDED_SETS, *benchmarks, *DirectoriesCompleter()(prefix)]


def rules(**_: Any) -> Iterable[str]:
    return RULE_NAMES


def rewards(prefix: str, **_: Any) -> list[str]:
    """Names of rewards, and files that may define one."""
    return [*REWARD_NAMES, *FilesCompleter(("py", "yaml", "yml"))(prefix)]


def prompt_sets(prefix: str, **_: Any) -> list[str]:
    """Names of prompt sets, and text files."""
    return [*PROMPT_SET_NAMES, *FilesCompleter(("txt",))(prefix)]


def devices(**_: Any) -> Iterable[str]:
    return DEVICES


def models(**_: Any) -> Iterable[str]:
    return MODELS


def compile_modes(**_: Any) -> Iterable[str]:
    return COMPILE_MODES


def configs(folder: str) -> Completer:
    """Packaged configurations of a folder, and YAML files."""

    def completer(prefix: str, **_: Any) -> list[str]:
        packaged = [f"{folder}/{file.stem}" for file in sorted((FOLDER / folder).glob("*.yaml"))]
        return [*packaged, *FilesCompleter(("yaml", "yml"))(prefix)]

    return completer


def several(known: Iterable[str]) -> Completer:
    """Names separated by commas, each once."""

    def completer(prefix: str, **_: Any) -> list[str]:
        before, comma, _last = prefix.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in known if name not in given]

    return completer


benchmark_rules = several(BENCHMARK_RULES)
baselines = several(BASELINES)
original_rewards = several(ORIGINAL_REWARDS)


def objectives(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of the objectives of the set that was given before."""
    given = getattr(parsed_args, "set", None)
    folder = EMBEDDED_SETS.get(str(given), Path(str(given)))
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return [str(adapter["name"]) for adapter in values["adapters"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def weights(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """`A=` for each objective of the set, after those that are there."""
    before, comma, _last = prefix.rpartition(",")
    given = [part.partition("=")[0] for part in before.split(",")]
    return [f"{before}{comma}{name}=" for name in objectives(prefix, parsed_args) if name not in given]
