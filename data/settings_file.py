"""Settings from YAML files: values of dataclass fields, with errors that name unknown keys and wrong types."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from stepfuse.configs import FOLDER
from stepfuse.data.names import near_names, nearest, suggestion
from stepfuse.data.text_files import file_name

S = TypeVar("S")

# For argparse, whose own pattern does not match -1e-3 and -inf and treats them as flags.
NEGATIVE_NUMBER = re.compile(r"^-(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf(?:inity)?|nan)$", re.IGNORECASE)


def find_config(name: str, folder: str) -> Path:
    """Find a configuration file by its path, or a packaged configuration by its name, or raise ValueError.

    A name that is no file is looked up among the packaged configurations of a folder such as `dpo`, with or without the
    folder's name and the suffix: there `emoji-alignment`, `dpo/emoji-alignment` and `configs/dpo/emoji-alignment.yaml`
    are the same file.
    """
    if Path(name).is_file():
        return Path(name)
    short = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    packaged = {file.stem: file for file in sorted((FOLDER / folder).glob("*.yaml"))}
    found = packaged.get(short.removeprefix(f"{folder}/"))
    if found is not None:
        return found
    if Path(name).exists():
        raise ValueError(f"config {name!r} is a folder; expected a file")
    names = [f"{folder}/{stem}" for stem in packaged]
    if (FOLDER / f"{short}.yaml").is_file():
        raise ValueError(f"config {name!r} belongs to another command; expected a file or one of {', '.join(names)}")
    near = [f"{folder}/{stem}" for stem in near_names(short.rpartition("/")[2], packaged)]
    expected = suggestion(near) or f"; expected one of {', '.join(names)}"
    raise ValueError(f"no config file {name!r} and no packaged configuration of this name{expected}")


def read_settings(file: Path, settings: type, *, besides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of `name: value` lines, whose names are fields of a dataclass, or in `besides`.

    If the file is missing or malformed, or a name is unknown, ValueError is raised; it suggests a known name.
    """
    from stepfuse.data.yaml_file import read_yaml  # imports PyYAML, which the options of a command do not need

    values = read_yaml(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file_name(file)} does not hold settings; expected `name: value` lines")
    hints = get_type_hints(settings)
    try:
        check_names(values, settings, besides=besides)
        return {str(name): _resolve_words(value, hints.get(name, str)) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file_name(file)} holds a value that contains itself") from error


def load_settings(
    file: Path, settings: type[S], changes: dict[str, Any] | None = None, *, besides: Sequence[str] = ()
) -> S:
    """A settings dataclass from a YAML file and from changes of its values; a ValueError names the file.

    Names in `besides` may be in the file, and are left out.
    """
    values = read_settings(file, settings, besides=besides)
    changes = changes or {}
    try:
        check_names(changes, settings)
        return settings(**{name: value for name, value in values.items() if name not in besides} | changes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _resolve_words(value: Any, hint: Any) -> Any:
    """Convert yes, no, on and off in a YAML value to strings where the type hint allows strings, else to booleans.

    In mappings without type hints, such as the arguments of a worker, they become booleans.
    """
    from stepfuse.data.yaml_file import Word

    if isinstance(value, Word):
        types = {type(choice) if get_origin(hint) is Literal else choice for choice in (hint, *get_args(hint))}
        return str(value) if str in types or not types & {bool, Any, dict, list} else value.boolean
    if isinstance(value, list):
        return [_resolve_words(item, (get_args(hint) or (Any,))[0]) for item in value]
    if isinstance(value, dict):
        inner = str if hint is str else Any  # the values of `env` are strings
        return {str(key) if isinstance(key, Word) else key: _resolve_words(item, inner) for key, item in value.items()}
    return value


def check_names(values: Mapping[str, Any], settings: type, *, besides: Sequence[str] = ()) -> None:
    """Raise ValueError if a name is neither a field of the dataclass `settings` nor in `besides`."""
    names = [f.name for f in dataclasses.fields(settings)]
    for key in values:
        if key not in names and key not in besides:
            raise ValueError(f"unknown setting {key!r}{nearest(str(key), names)}")


def check_types(settings: Any) -> None:
    """Raise ValueError if a field of a settings dataclass has a value of another type than its annotation."""
    hints = get_type_hints(type(settings))
    for name in (field.name for field in dataclasses.fields(settings)):
        value, hint = getattr(settings, name), hints[name]
        if not _matches(value, hint):
            expected = str(hint) if get_args(hint) else hint.__name__
            if choices := _choices(hint):
                expected = f"one of {', '.join(choices)}{nearest(str(value), choices)}"
            raise ValueError(f"{name} is {value!r}; expected {expected}")


def _choices(hint: Any) -> list[str]:
    """The values that a Literal, or an optional Literal, allows."""
    literals = [inner for inner in (hint, *get_args(hint)) if get_origin(inner) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal)]


def _matches(value: object, hint: Any) -> bool:
    """Whether a value has the type of a hint. An int is also a float, and a bool is not an int."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_matches(item, inner[0]) for item in value)
    if inner:  # a union
        return any(_matches(value, choice) for choice in inner)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError unless a condition on a setting holds."""
    if not condition:
        raise ValueError(f"{name} is {value}; expected {expected}")
