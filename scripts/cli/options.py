"""Options that are the fields of a settings dataclass."""

import argparse
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from stepfuse.scripts.cli.completion import one_of, several
from stepfuse.scripts.cli.parser import Arguments, Parser, option, with_default

S = TypeVar("S")


def names(text: str) -> tuple[str, ...]:
    """`a,b` → ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """`1,2` → (1, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers, such as 1,2,4,8") from None


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
            text = f"For the rule {rule}: {with_default(text[0].lower() + text[1:], default)}"
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
        option(parser.group(declared["group"] or ("fusion" if rule else "")), name, kind, text, default=default, **more)


def settings_of(settings: type[S], arguments: Arguments, **more: Any) -> S:
    """A settings dataclass from the arguments that have the names of its fields, and from `more`.

    Raises:
        ValueError: For an invalid value, with the name of its option, which the settings' own error begins with.
    """
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    try:
        return settings(**given | more)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
