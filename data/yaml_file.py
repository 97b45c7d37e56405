"""YAML as its version 1.2 has it: `1e-5` is a number, `012` is twelve, and no key comes twice."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stepfuse.data.text_files import file_name, read_text

_INTEGER = r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"


class Word(str):
    """One of yes, no, on and off: a text in YAML 1.2 and a boolean in YAML 1.1."""

    __slots__ = ()

    @property
    def boolean(self) -> bool:
        return self.lower() in ("yes", "on")


def read_yaml(file: Path) -> Any:
    """The value that a YAML file holds; yes, no, on and off come as `Word`, for the caller to convert.

    Raises:
        ValueError: for a file that is missing or is not YAML, and for a key that comes twice, naming the line.
    """
    return parse_yaml(read_text(file), file_name(file))


def parse_yaml(text: str, name: str) -> Any:
    """Parse a YAML text; errors begin with its name, and are those of `read_yaml`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        marks = [error.problem_mark or error.context_mark]
        if (error.context or "").startswith("while "):  # what is read began earlier than where the fault is noticed
            marks.append(error.context_mark)
        lines = sorted({mark.line + 1 for mark in marks if mark})
        line = f", line {' to '.join(map(str, lines))}" if lines else ""
        reason = ": ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        raise ValueError(f"{name}{line} is not YAML: {reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


def yaml_text(values: Mapping[str, Any]) -> str:
    """YAML of which `read_yaml` makes the same values: texts such as 1e5, which are numbers in YAML 1.2, are quoted."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2; underscores in numbers are kept from 1.1."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} comes twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_word(self, node: Any) -> Word:
        return Word(self.construct_scalar(node))

    def construct_integer(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > 100:
            raise yaml.constructor.ConstructorError(None, None, f"{text[:20]}… is too long a number", node.start_mark)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def construct_float(self, node: Any) -> float:
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what its own and our loader would not read as a text."""


# The kind of a plain scalar: a pattern, the characters it may begin with, and what makes a value of it.
for _kind, _pattern, _first, _construct in (
    ("merge", "<<", ["<"], None),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""], None),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF"), None),
    ("word", "yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", list("yYnNoO"), _Loader.construct_word),
    ("int", _INTEGER, list("-+0123456789"), _Loader.construct_integer),
    ("float", _FLOAT, list("-+0123456789."), _Loader.construct_float),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)
    if _kind in ("int", "float"):
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)
    if _construct is not None:
        _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)
