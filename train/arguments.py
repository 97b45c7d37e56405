"""The command line of a training program, from its settings dataclass. Importing this module does not import torch."""

import argparse
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NoReturn, TypeVar, cast, get_args

from trl import TrlParser

from stepfuse.data.missing_value import with_help
from stepfuse.data.names import nearest
from stepfuse.data.settings_fields import parse_mapping, setting_texts
from stepfuse.data.settings_file import NEGATIVE_NUMBER, find_config, read_settings
from stepfuse.train.joint_settings import OF_OBJECTIVE
from stepfuse.train.settings import TrainSettings

S = TypeVar("S", bound=TrainSettings)

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_settings(settings: type[S], arguments: Sequence[str]) -> S:
    """The settings of a run, from flags and from the YAML file that `--config` names; see `parse_values`."""
    return settings(**parse_values(settings, arguments))


def parse_values(settings: type[TrainSettings], arguments: Sequence[str]) -> dict[str, Any]:
    """Read the values of settings from flags and from the YAML file that `--config` names. Flags win.

    Every field is a flag, which may be written with underscores or dashes. The mapping `env` of the file, if there is
    one, is added to the environment.

    Raises:
        ValueError: For an unknown flag or key, with the nearest one; for a missing or malformed file; and for a value
            of the wrong type. The settings themselves refuse what is out of range.
        SystemExit: For `--help`.
    """
    parser = SettingsParser(settings)
    if settings.positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{settings.positional}", *arguments]
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        written = unknown[0].split("=")[0]
        kind = "flag" if written.startswith("-") else "argument"
        known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        raise ValueError(f"unknown {kind} {written}{nearest(written, known)}")
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
    del given["config"]
    _check_flags_of_objectives(arguments, given)
    return given


def _check_flags_of_objectives(arguments: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise ValueError for a flag without effect: each of several objectives has its own value."""
    entries = [entry for entry in given.get("objectives") or [] if isinstance(entry, Mapping)]
    flags = (word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments if word.startswith("--"))
    for name in flags:
        if entries and name in OF_OBJECTIVE and all(name in entry for entry in entries):
            own = ", ".join(str(entry[name]) for entry in entries)
            example = " ".join(f"'{{{name}: {value}}}'" for value in (given[name], "…"))
            raise ValueError(
                f"--{name} {given[name]} has no effect: each of the objectives has its own {name} ({own}); write "
                f"--objectives {example}, or take a configuration of one objective"
            )


class SettingsParser(TrlParser):
    """A parser with a flag for every field, in groups and with one spelling in its help, that raises ValueError.

    The method `parse_args_and_config` is not used, because it reads YAML 1.1, in the encoding of the locale.
    """

    def __init__(self, settings: type[TrainSettings]) -> None:
        program = f"accelerate launch --quiet -m stepfuse.train.{settings.program}"
        first_word = f" [{settings.positional.upper()}]" if settings.positional else ""
        super().__init__(
            usage=f"{program}{first_word} [--config FILE] [--SETTING VALUE ...]",
            description=settings.description,
            epilog="Every setting is also a line `setting: value` of the YAML file. Flags may be written with dashes. "
            f"In a checkout, `train/{settings.program}.py` is the same as `-m stepfuse.train.{settings.program}`. "
            "With --quiet the launcher prints no traceback of its own if the run fails. One process needs no launcher: "
            f"`python -m stepfuse.train.{settings.program}` is the same, and starts sooner.",
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
        texts, groups = setting_texts(settings), {}
        for field in (field for field in dataclasses.fields(settings) if field.name not in settings.fixed):
            heading, text = texts[field.name]
            if heading not in groups:
                groups[heading] = self.add_argument_group(heading)
            self._add_setting(groups[heading], field, text)

    def _add_setting(self, group: Any, field: dataclasses.Field, text: str) -> None:
        names = (f"--{field.name}", f"--{field.name.replace('_', '-')}")
        if field.type in (dict, list):
            kind = _Mapping if field.type is dict else _Mappings
            group.add_argument(*dict.fromkeys(names), nargs="*", action=kind, default=field.type())
        else:
            plain = copy.copy(field)
            plain.metadata = {}  # type: ignore[assignment]
            plain.default = True if field.type is bool else field.default  # for which the library adds `--no_FIELD`
            self._parse_dataclass_field(group, plain)
        flag, *negation = (action for action in self._actions if action.dest == field.name)
        for action in (flag, *negation):
            action.option_strings = action.option_strings[:1]  # of two spellings, the one to show
            action.help = argparse.SUPPRESS
        if field.type is bool:
            flag.type, flag.default = _boolean, field.default
        if flag.nargs == "+":
            flag.nargs = "*"  # so that a flag can empty a list
        if NoneType in get_args(field.type):
            flag.type = _or_none(cast(Any, flag.type))
        flag.choices = flag.choices or field.metadata.get("choices") or None
        flag.help = f"{text} (default: {shown(flag.default)})".replace("%", "%%")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Leave choices to the settings, which suggest the nearest."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(with_help(message, self._option_string_actions).removeprefix("argument "))


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == "?":
            return f"--{action.dest}, --no_{action.dest}"
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {"int": "INTEGER", "float": "NUMBER"}.get(getattr(action.type, "__name__", ""), "TEXT")


def shown(default: Any) -> str:
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
        try:
            setattr(namespace, self.dest, parse_mapping(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


class _Mappings(argparse.Action):
    """Mappings as in YAML, `{NAME: VALUE, NAME: VALUE}`, one an argument."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        from stepfuse.data.yaml_file import parse_yaml  # imports PyYAML, which other options do not need

        try:
            setattr(namespace, self.dest, [parse_yaml(text, repr(text)) for text in values])
        except ValueError as error:
            split = any(text.startswith("{") and not text.endswith("}") for text in values)
            quoted = "; quote each mapping, as in '{reward: warmth}'" * split
            raise argparse.ArgumentError(self, f"{error}{quoted}") from error


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__  # argparse's errors name it
    return convert
