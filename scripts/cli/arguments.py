"""The argument parser of `stepfuse`, and arguments that several commands have in common."""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from stepfuse.data.names import nearest
from stepfuse.data.settings_file import NEGATIVE_NUMBER
from stepfuse.scripts.cli import completion
from stepfuse.scripts.cli.choices import DTYPES, GUIDANCE


class Container(Protocol):
    """A parser, or one of its argument groups."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action: ...


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with short usage lines, and errors that name the nearest flag or command.

    Flags may be written with dashes or with underscores. Abbreviations are not accepted. A command whose name has two
    words, such as `benchmark training`, is recognised by its two words.
    """

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**defaults | options)
        self._negative_number_matcher = NEGATIVE_NUMBER

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        words = [*map(_with_underscores, given[:end]), *given[end:]]
        commands = self._commands
        if " ".join(words[:2]) in commands:
            words[:2] = [" ".join(words[:2])]
        if "_ARGCOMPLETE" not in os.environ:  # a line that is completed may have an unknown flag
            self._check_flags(words, before_command=bool(commands))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage line of this command and the error, and exit with status 2."""
        self.exit(2, f"{self.format_usage()}error: {message}\nAll options: {self.prog} --help\n")

    def format_usage(self) -> str:
        self.usage = self._short_usage()
        return super().format_usage()

    def format_help(self) -> str:
        self.usage = self._short_usage()
        return super().format_help()

    @property
    def _commands(self) -> Sequence[str]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return list(action.choices)
        return []

    def _short_usage(self) -> str:
        """The positional arguments, the required options, and `[options]` for the others."""
        parts = ["%(prog)s"]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parts.append(f"{action.metavar} …")
            elif not action.option_strings:
                name = str(action.metavar or action.dest)
                parts.append(f"[{name}]" if action.nargs == "?" else name)
        for action in self._actions:
            if action.option_strings and action.required:
                parts.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
        return " ".join([*parts, "[options]"])

    def _check_flags(self, words: Sequence[str], *, before_command: bool) -> None:
        """Refuse unknown flags before argparse looks for missing arguments, which may be missing for that reason."""
        known = self._option_string_actions
        for word in words:
            if word == "--" or (before_command and not word.startswith("-")):
                return
            name = word.partition("=")[0]
            if not word.startswith("-") or word == "-" or " " in name or name in known or _is_number(word):
                continue
            self.error(f"unknown flag {name}{nearest(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            expected = f"expected one of {', '.join(known)}{nearest(value, known)}"
            raise argparse.ArgumentError(action, f"{value!r}; {expected}")


def _with_underscores(word: str) -> str:
    """`--dry-run=x-y` → `--dry_run=x-y`; words that are no flags stay as they are."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or " " in name or name == "--":
        return word
    return "--" + name.removeprefix("--").replace("-", "_") + equals + value


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def add_command(actions: argparse._SubParsersAction, name: str, summary: str, example: str, about: str = "") -> Parser:
    """Add a command with its help page.

    Args:
        actions: The commands to add it to.
        name: Name of the command.
        summary: One clause for the list of commands, without a capital letter or a full stop.
        example: A command line that works as it stands.
        about: Further sentences for the command's own help page.
    """
    description = f"{summary[0].upper()}{summary[1:]}.{about and ' ' + about}"
    return actions.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, width=shutil.get_terminal_size().columns - 2, break_on_hyphens=False),
        epilog=f"example:\n  {example}",
    )


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, such as 4") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number, such as 0.5") from None


def names(text: str) -> tuple[str, ...]:
    """`a,b` → ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """`1,2` → (1, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers, such as 1,2,4,8") from None


def add_set(parser: Container, *, text: str = "", metavar: str = "SET", nargs: str | None = None) -> None:
    """The adapter set that a command reads."""
    own = text or "Adapter set: a folder, a Hugging Face Hub id OWNER/NAME or OWNER/NAME@REVISION, or emoji, the "
    own += "" if text else "set that is part of the package."
    action = parser.add_argument("set", type=Path, metavar=metavar, help=own, **({"nargs": nargs} if nargs else {}))
    completion.complete(action, completion.adapter_sets)


def add_device(parser: Container, *, dtype: str = "the base model") -> None:
    """Where models run, and in what precision."""
    add_device_alone(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help=f"Floating-point type of {dtype} (default: %(default)s).",
    )


def add_device_alone(parser: Container) -> None:
    """Where models run."""
    action = parser.add_argument(
        "--device", metavar="NAME", help="Torch device, such as cpu or cuda:1 (default: cuda if available, else cpu)."
    )
    completion.complete(action, completion.devices)


def add_guidance(parser: Container) -> None:
    """Classifier-free guidance of a set."""
    parser.add_argument(
        "--guidance",
        choices=GUIDANCE,
        help="Which model makes the unconditional prediction of classifier-free guidance. shared: the base, once for "
        "all adapters; full: each adapter its own, which doubles the cost; off: no guidance (default: that of the "
        "set).",
    )
    parser.add_argument(
        "--guidance_scale",
        type=number,
        metavar="G",
        help="Scale of classifier-free guidance, such as 7.5; 1 is no guidance (default: that of the set).",
    )


def add_trust(parser: Container) -> None:
    """Rewards of a set that are code or servers."""
    parser.add_argument(
        "--trust_rewards",
        action="store_true",
        help="Load rewards of the set that are Python files, which run their code, or servers, which are sent the "
        "images (default: refuse them).",
    )


def add_size(parser: Container) -> None:
    """Height and width of images."""
    for name in ("height", "width"):
        parser.add_argument(
            f"--{name}",
            type=whole,
            metavar="PIXELS",
            help=f"{name.capitalize()} of the images in pixels, such as 512 (default: that of the base model).",
        )


def add_output(parser: Container, default: str, what: str) -> None:
    """A file to write."""
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path(default), help=f"{what} (default: %(default)s)."
    )
    add_overwrite(parser, "the output file")


def add_overwrite(parser: Container, what: str, *, folder: bool = False) -> None:
    """Whether existing output is replaced; of a folder, the files that stepfuse wrote."""
    kept = "; files that stepfuse did not write stay" if folder else ""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"Replace {what} if it exists{kept} (default: stop with an error).",
    )
