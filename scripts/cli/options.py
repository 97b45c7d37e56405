"""Options of the commands: one function declares an option, another all options of a settings dataclass."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from stepfuse.data.settings_fields import AT_LEAST_1, FINITE, Bounds
from stepfuse.scripts.cli.completion import Completer, one_of, several
from stepfuse.scripts.cli.parser import Parser

Container = argparse._ActionsContainer  # a parser, or one of its groups
S = TypeVar("S")
BOUNDS = {int: AT_LEAST_1, float: FINITE}  # unless an option declares others


@dataclass(frozen=True)
class Number:
    """The type of an option that is a number."""

    name: str
    kind: type[int] | type[float]
    bounds: Bounds

    def __call__(self, text: str) -> int | float:
        try:
            return self.kind(text)
        except ValueError:
            example = "a whole number, such as 4" if self.kind is int else "a number, such as 0.5"
            raise argparse.ArgumentTypeError(f"{text!r}; expected {example}") from None

    def check(self, value: int | float) -> None:
        if not self.bounds.allow(value):
            raise ValueError(f"{self.name} {value}; expected {self.bounds}")


def names(text: str) -> tuple[str, ...]:
    """`a,b` → ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """`1,2` → (1, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers, such as 1,2,4,8") from None


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
        aliases: Other names of the option.
        bounds: Other bounds of a number.
        complete: What the shell offers as values.
        check: Raises a ValueError for an invalid value. It is called after all arguments are parsed, so that a missing
            argument is reported first.
        more: Further arguments of `add_argument`, such as `required=True` or `choices=…`.
    """
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if kind is bool:
        more["action"] = "store_false" if default else "store_true"
    else:
        if kind in (int, float):
            kind = Number(name, kind, bounds or BOUNDS[kind])
            check, metavar = kind.check, metavar or "N"
        more |= {"type": kind, "metavar": metavar or None, "default": default}
    action = parser.add_argument(name, *aliases, help=_with_default(text, default), **more)
    action.check = check  # type: ignore[attr-defined]
    if complete is not None:
        action.completer = complete  # type: ignore[attr-defined]


def _with_default(text: str, default: Any) -> str:
    return text if default is None or "(default" in text else f"{text.removesuffix('.')} (default: {default})."


def add_settings(parser: Parser, settings: type, *, rule: str = "") -> None:
    """Add an option for each field of a settings dataclass whose `setting` has a text, under its heading.

    A field of type bool that is on by default becomes `--no_NAME`.

    Args:
        rule: The fusion rule whose options these are. They are None unless given, since other rules refuse them.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        declared, hint, name = field.metadata, hints[field.name], f"--{field.name}"
        text, default = declared.get("text"), field.default
        if not text:
            continue
        if rule:
            text = f"For the rule {rule}: {_with_default(text[0].lower() + text[1:], default)}"
            default = None
        more = {key: declared[key] for key in ("metavar", "aliases", "bounds")}
        kind, *_ = (part for part in (*get_args(hint), hint) if part is not type(None))
        if get_origin(hint) is Literal:
            kind, more["choices"] = str, tuple(choice for choice in get_args(hint) if choice)
        elif get_origin(hint) is tuple:
            kind, more["metavar"] = numbers if kind is int else names, declared["metavar"] or "A,B"
        elif default is True:
            name, more["dest"] = f"--no_{field.name}", field.name
        if offered := declared["choices"] or declared["suggestions"]:
            more["complete"] = several(offered) if kind is names else one_of(offered)
        option(parser.group(declared["group"]), name, kind, text, default=default, **more)


def settings_of(settings: type[S], arguments: argparse.Namespace, **more: Any) -> S:
    """A settings dataclass from the arguments that have the names of its fields.

    Args:
        more: Fields that are not arguments, or have other values.

    Raises:
        ValueError: For an invalid value, with the name of its option, which the settings' own error begins with.
    """
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    try:
        return settings(**given | more)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
