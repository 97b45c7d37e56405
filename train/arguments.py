"""The command line of a training program, from its settings dataclass. Importing this module does not import torch."""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from stepfuse.data.names import nearest
from stepfuse.data.settings_file import NEGATIVE_NUMBER, find_config, read_settings
from stepfuse.train.setting import help_texts
from stepfuse.train.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_settings(settings: type[S], arguments: Sequence[str], description: str = "") -> S:
    """Read the settings of a run from flags and from the YAML file that `--config` names. Flags win.

    Flags may be written with underscores or dashes. The mapping `env` of the file, if there is one, is added to the
    environment.

    Args:
        settings: Dataclass of the settings; every field is a flag.
        arguments: Command line without the program's name.
        description: Text at the beginning of `--help`.

    Raises:
        ValueError: For an unknown flag or key, with the nearest one; for a missing or malformed file; and for a value
            of the wrong type or out of range.
        SystemExit: For `--help`.
    """
    parser = _Parser(settings, description)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        written = unknown[0].split("=")[0]
        kind = "flag" if written.startswith("-") else "argument"
        raise ValueError(f"unknown {kind} {written}{nearest(written, parser.names)}")
    if flags.config is not None:
        file = find_config(flags.config, settings.program)
        values = read_settings(file, settings, besides=("env",))
        environment = values.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ValueError(f"{file}: env is {environment!r}; expected a mapping of environment variables")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        parser.set_defaults(**values)
        try:
            parser.parse_args([])  # converts the texts among them, such as quoted numbers
        except ValueError as error:
            raise ValueError(f"{file}: {str(error).removeprefix('--')}") from error
    given = vars(parser.parse_args(arguments))
    return settings(**{name: value for name, value in given.items() if name != "config"})


class _Parser(argparse.ArgumentParser):
    """A parser with a flag for every field, in groups, that raises ValueError."""

    def __init__(self, settings: type[TrainSettings], description: str) -> None:
        program = f"accelerate launch --quiet train/{settings.program}.py"
        super().__init__(
            usage=f"{program} [--config FILE] [--SETTING VALUE ...]",
            description=description,
            epilog="Every setting is also a line `setting: value` of the YAML file. Flags may be written with dashes. "
            f"Without a checkout, the command is `accelerate launch --quiet -m stepfuse.train.{settings.program}`. "
            "With --quiet the launcher prints no traceback of its own if the run fails.",
            formatter_class=functools.partial(_Formatter, max_help_position=30),
            allow_abbrev=False,
            add_help=False,
        )
        self._negative_number_matcher = NEGATIVE_NUMBER
        first = self.add_argument_group("configuration")
        first.add_argument(
            "--config",
            metavar="FILE",
            help=f"YAML file of settings, or the name of a packaged configuration, for example {settings.example}. "
            "Flags override it.",
        )
        first.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        texts, groups = help_texts(settings), {}
        for field in dataclasses.fields(settings):
            heading, text = texts[field.name]
            if heading not in groups:
                groups[heading] = self.add_argument_group(heading)
            self._add_setting(groups[heading], field, text)

    def _add_setting(self, group: Any, field: dataclasses.Field, text: str) -> None:
        factory: Any = field.default_factory
        default: Any = field.default if factory is dataclasses.MISSING else factory()
        kind: Any = field.type
        options: dict[str, Any]
        if kind is dict:
            options = {"nargs": "*", "action": _Mapping}
        elif get_origin(kind) is list:
            options = {"nargs": "*", "type": get_args(kind)[0]}
        elif kind is bool:
            options = {"nargs": "?", "const": True, "type": _boolean}
        else:
            one = get_args(kind)[0] if NoneType in get_args(kind) else kind
            choices = get_args(one) or field.metadata.get("choices")
            scalar = str if choices else one
            options = {"type": scalar if one is kind else _or_none(scalar), "choices": choices}
        shown = f"{text} (default: {_shown(default)})".replace("%", "%%")
        self._add(group, field.name, default=default, help=shown, **options)
        if kind is bool:
            self._add(group, f"no_{field.name}", action="store_false", dest=field.name, help=argparse.SUPPRESS)

    def _add(self, group: Any, name: str, **options: Any) -> None:
        """Add a flag, which may be written with dashes and is shown with underscores."""
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        action = group.add_argument(*names, **options)
        action.option_strings = action.option_strings[:1]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Leave choices to the settings, which suggest the nearest."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    @property
    def names(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == "?":
            return f"--{action.dest}, --no_{action.dest}"
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {"int": "INTEGER", "float": "NUMBER"}.get(getattr(action.type, "__name__", ""), "TEXT")


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | dict):
        return " ".join(map(str, default)) or "unset"
    return "unset" if default in (None, "") else f"{default:g}" if isinstance(default, float) else str(default)


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected true or false")
    return BOOLEANS[text.lower()]


class _Mapping(argparse.Action):
    """`NAME=VALUE …`, where values are numbers or lists of numbers as in JSON."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        mapping = {}
        for text in values:
            name, _, value = text.partition("=")
            try:
                mapping[name] = json.loads(value)
            except ValueError as error:
                raise argparse.ArgumentError(self, f"{text!r}; expected NAME=NUMBER") from error
        setattr(namespace, self.dest, mapping)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__  # argparse's errors name it
    return convert
