"""The command line of a training program, from its settings dataclass. Importing this module does not import torch."""

import argparse
import dataclasses
import os
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from stepfuse.data.names import nearest
from stepfuse.data.settings_file import find_config, read_settings
from stepfuse.train.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_settings(settings: type[S], arguments: Sequence[str], description: str = "") -> S:
    """Read the settings of a run from flags and from the YAML file that `--config` names. Flags win.

    Flags may be written with underscores or dashes. The mapping `env` of the file, if there is one, is added to the
    environment, as trl's `TrlParser` does.

    Args:
        settings: Dataclass of the settings; every field is a flag.
        arguments: Command line without the program's name.
        description: Text at the beginning of `--help`.

    Raises:
        ValueError: For an unknown flag or key, with the nearest one; for a missing or malformed file; and for a value
            of the wrong type or out of range.
        SystemExit: For `--help`.
    """
    hints = get_type_hints(settings)
    converters = {f.name: _converter(hints[f.name]) for f in dataclasses.fields(settings)}
    parser = _make_parser(settings, converters, description)
    parsed, unknown = parser.parse_known_args([_underscored(argument) for argument in arguments])
    if unknown:
        written = next(argument for argument in arguments if _underscored(argument) == unknown[0]).split("=")[0]
        kind = "flag" if written.startswith("-") else "argument"
        raise ValueError(f"unknown {kind} {written}{nearest(unknown[0].split('=')[0], parser.flags)}")
    flags = vars(parsed)
    config = flags.pop("config", None)
    values = {} if config is None else _read_config(config, settings, converters)
    return settings(**values | flags)


def _read_config(config: str, settings: type[TrainSettings], converters: dict[str, Callable]) -> dict[str, Any]:
    file = find_config(config, settings.algorithm)
    values = read_settings(file, settings, besides=("env",))
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{file}: env is {environment!r}; expected a mapping of environment variables")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    for name, value in values.items():
        if isinstance(value, str):  # a quoted number, say
            try:
                values[name] = converters[name](value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{file}: {name} is {error}") from error
    return values


def _underscored(argument: str) -> str:
    """A flag with underscores instead of dashes; its value is unchanged."""
    if not re.match(r"--\w", argument):
        return argument
    flag, *value = argument.split("=", 1)
    return "=".join(["--" + flag[2:].replace("-", "_"), *value])


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError, and suggests the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    @property
    def flags(self) -> list[str]:
        return sorted(flag for flag in self._option_string_actions if flag.startswith("--"))


class _Switch(argparse.Action):
    """`--flag`, `--no_flag`, or `--flag true` and `--flag false`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values != str(option_string).startswith("--no_"))


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return ", ".join(action.option_strings)
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[-1]} {self._format_args(action, 'VALUE')}"


def _make_parser(settings: type[TrainSettings], converters: dict[str, Callable], description: str) -> _Parser:
    program = f"accelerate launch --quiet train/{settings.algorithm}.py"
    parser = _Parser(
        usage=f"{program} [--config FILE] [--SETTING VALUE ...]",
        description=description,
        epilog="Every setting is also a line `setting: value` of the YAML file. Flags may be written with dashes. "
        f"Without a checkout, the command is `accelerate launch --quiet -m stepfuse.train.{settings.algorithm}`. With "
        "--quiet the launcher prints no traceback of its own if the run fails.",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    first = parser.add_argument_group("configuration")
    first.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings, or the name of a packaged configuration, for example "
        f"{settings.algorithm}/emoji-{'alignment' if settings.algorithm == 'dpo' else 'compressibility'}. Flags "
        "override it.",
    )
    first.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    titles = dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(settings))
    groups = {title: parser.add_argument_group(title) for title in titles}
    hints, defaults = get_type_hints(settings), settings()
    for field in dataclasses.fields(settings):
        group = groups[field.metadata["group"]]
        default = getattr(defaults, field.name)
        text = f"{field.metadata['help']} (default: {_shown(default)})".replace("%", "%%")
        hint = hints[field.name]
        options: dict[str, Any] = {"type": converters[field.name], "help": text}
        if hint is bool:
            names = [f"--{field.name}", f"--no_{field.name}"]
            group.add_argument(*names, dest=field.name, action=_Switch, nargs="?", const=True, **options)
        else:
            if get_origin(hint) is list:
                options["nargs"] = "*"
            group.add_argument(f"--{field.name}", metavar=_metavar(hint), **options)
    return parser


def _plain(hint: Any) -> tuple[Any, bool]:
    """The type of one value, without list and None, and whether None is allowed."""
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (inner for inner in get_args(hint) if inner is not type(None))
        return kind, True
    return (get_args(hint)[0], False) if get_origin(hint) is list else (hint, False)


def _metavar(hint: Any) -> str:
    kind, _ = _plain(hint)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return " ".join(map(str, default)) or "unset"
    return "unset" if default in (None, "") else f"{default:g}" if isinstance(default, float) else str(default)


def _converter(hint: Any) -> Callable[[str], Any]:
    """From a word of the command line to a value of this type.

    The function raises argparse.ArgumentTypeError for any other word.
    """
    kind, optional = _plain(hint)

    def convert(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            if text not in choices:
                raise argparse.ArgumentTypeError(
                    f"{text!r}; expected one of {', '.join(choices)}{nearest(text, choices)}"
                )
            return text
        if kind is bool:
            if text.lower() not in BOOLEANS:
                raise argparse.ArgumentTypeError(f"{text!r}; expected true or false")
            return BOOLEANS[text.lower()]
        try:
            return kind(text)
        except ValueError:
            expected = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}") from None

    return convert
