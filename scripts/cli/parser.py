"""The argument parser of `stepfuse`: short usage lines, two spellings of flags, and errors with suggestions.

Nothing here imports torch.
"""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from stepfuse.data.missing_value import with_help
from stepfuse.data.names import nearest
from stepfuse.data.settings_fields import AT_LEAST_1, FINITE, Bounds
from stepfuse.data.settings_file import NEGATIVE_NUMBER

Arguments = argparse.Namespace
Container = argparse._ActionsContainer  # a parser, or one of its groups
Completer = Callable[..., Iterable[str]]
BOUNDS = {int: AT_LEAST_1, float: FINITE}  # unless an option declares others


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with short usage lines, and errors that name the nearest flag or command.

    Flags may be written with dashes or with underscores. Abbreviations are not accepted. After all arguments are
    parsed, a value is passed to the `check` of its action, if there is one, whose ValueError names the value.
    """

    elsewhere: Mapping[str, str] = {}  # for commands that are not of this parser, what to use

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._negative_number_matcher = NEGATIVE_NUMBER

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        words = [*map(_with_underscores, given[:end]), *given[end:]]
        if "_ARGCOMPLETE" in os.environ:  # the line to complete may have errors
            return super().parse_known_args(words, namespace)
        self._check_flags(words)
        found, rest = super().parse_known_args(words, namespace)
        if rest and self._subparsers is None:
            joined = "; values of one option are joined by commas, as in a=0.5,b=0.5" * ("=" in rest[0])
            self.error(f"unexpected argument {rest[0]!r}{joined}")
        for action in self._actions:
            value, check = getattr(found, action.dest, None), getattr(action, "check", None)
            if check is not None and value is not None:
                check(value)
        return found, rest

    def explain(self, example: str, about: str = "") -> None:
        """Complete the help page of a command.

        Args:
            example: A command line that works as it stands.
            about: Further sentences after the summary.
        """
        self.epilog = f"example:\n  {example}"
        text = f"{self.description} {about}".strip()
        self.description = textwrap.fill(text, width=shutil.get_terminal_size().columns - 2, break_on_hyphens=False)

    def group(self, title: str) -> "argparse._ArgumentGroup | Parser":
        """The group of options with this title, which is created if there is none; without a title, the parser."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title) if title else self

    def error(self, message: str) -> NoReturn:
        """Print the usage line of this command and the error, and exit with status 2."""
        message = with_help(message, self._option_string_actions)
        self.exit(2, f"{self.format_usage()}error: {message}\nAll options: {self.prog} --help\n")

    def format_usage(self) -> str:
        self.usage = self._short_usage()
        return super().format_usage()

    def format_help(self) -> str:
        self.usage = self._short_usage()
        return super().format_help()

    def _short_usage(self) -> str:
        """The positional arguments, the required options, and `[options]` for the others."""
        positional, required = [], []
        for action in self._actions:
            name = str(action.metavar or action.dest)
            if isinstance(action, argparse._SubParsersAction):
                positional.append(f"{name} …")
            elif not action.option_strings:
                positional.append(f"[{name}]" if action.nargs == "?" else name)
            elif action.required:
                required.append(f"{action.option_strings[0]} {name}")
        return " ".join(["%(prog)s", *positional, *required, "[options]"])

    def _check_flags(self, words: Sequence[str]) -> None:
        """Refuse unknown flags before argparse looks for missing arguments, which may be missing for that reason."""
        known = self._option_string_actions
        for word in words:
            is_flag = word.startswith("-") and word != "-"
            if word == "--" or (self._subparsers is not None and not is_flag):
                return
            name = word.partition("=")[0]
            if is_flag and " " not in name and name not in known and not NEGATIVE_NUMBER.match(word):
                if any(action.dest == name[2:] for action in self._actions if not action.option_strings):
                    self.error(f"unknown flag {name}; the {name[2:]} is an argument without a flag")
                self.error(f"unknown flag {name}{nearest(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            expected = f"expected one of {', '.join(known)}{nearest(value, known)}"
            raise argparse.ArgumentError(action, f"{value!r}; {self.elsewhere.get(value, expected)}")


def _with_underscores(word: str) -> str:
    """`--dry-run=x-y` → `--dry_run=x-y`; words that are no flags stay as they are."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or " " in name or name == "--":
        return word
    return "--" + name.removeprefix("--").replace("-", "_") + equals + value


@dataclass(frozen=True, kw_only=True)
class Number:
    """The type of an option that is a number."""

    name: str
    kind: type[int] | type[float]
    bounds: Bounds
    choices: Sequence[int | float] = ()
    default: int | float | None = None

    def __call__(self, text: str) -> int | float:
        try:
            return self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}; expected {self.expected}") from None

    @property
    def expected(self) -> str:
        """What is accepted, in words: the choices, or a number with the default as its example, or the bounds."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        noun, bounds = "a whole number" if self.kind is int else "a number", str(self.bounds)
        if self.default is not None:
            return f"{noun}, such as {self.default}"
        return bounds if bounds.startswith("a ") else f"{noun}, {bounds}"

    def check(self, value: int | float) -> None:
        if not self.bounds.allow(value):
            raise ValueError(f"{self.name} {value}; expected {self.bounds}")


def option(
    parser: Container,
    name: str,
    kind: Callable[[str], Any],
    text: str,
    *,
    aliases: Sequence[str] = (),
    metavar: str = "",
    default: Any = None,
    bounds: Bounds | None = None,
    complete: Completer | None = None,
    check: Callable[[Any], object] | None = None,
    **more: Any,
) -> None:
    """Add an option `--name`, or a positional argument.

    Args:
        kind: Converts the value: `int` for a whole number of 1 or more, `float` for a finite number, `bool` for a flag
            without a value, or a function.
        text: What `--help` says. A default that it does not mention is appended.
        bounds: Other bounds of a number.
        complete: What the shell offers as values.
        check: Raises a ValueError for an invalid value. It is called after all arguments are parsed, so that a missing
            argument is reported first.
        more: Of `add_argument`.
    """
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if kind is bool:
        more["action"] = "store_false" if default else "store_true"
    else:
        if kind in (int, float):
            choices = more.get("choices", ())
            kind = Number(name=name, kind=kind, bounds=bounds or BOUNDS[kind], choices=choices, default=default)
            check, metavar = kind.check, metavar or "N"
        more |= {"type": kind, "metavar": metavar or None, "default": default}
    action = parser.add_argument(name, *aliases, help=with_default(text, default), **more)
    action.check = check  # type: ignore[attr-defined]
    if complete is not None:
        action.completer = complete  # type: ignore[attr-defined]


def with_default(text: str, default: Any) -> str:
    """A help text that ends in its default."""
    return text if default is None or "(default" in text else f"{text.removesuffix('.')} (default: {default})."
