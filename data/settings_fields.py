"""Fields of settings dataclasses: bounds, names and help. Importing this module imports neither torch nor PyYAML."""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from stepfuse.data.names import nearest
from stepfuse.data.seeds import LIMIT
from stepfuse.data.settings_file import check_types, require


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of a number.

    Attributes:
        least, above: Lower bound, inclusive or exclusive.
        most, below: Upper bound, inclusive or exclusive.
        finite: Whether infinity, which switches some limits off, is out of bounds.
        expected: The bounds in words; by default an interval.
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    finite: bool = True
    expected: str = ""

    def allow(self, value: float) -> bool:
        if value == math.inf and not self.finite:
            return self.most == self.below == math.inf
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low = f"({self.above:g}" if self.least == -math.inf else f"[{self.least:g}"
        high = f"{self.below:g})" if self.most == math.inf else f"{self.most:g}]"
        one_sided = {"[0": "0 or more", "(0": "a positive number", "(-inf": "a finite number"}
        if high == "inf)":
            return self.expected or one_sided.get(low, f"{self.least:g} or more")
        return self.expected or f"a number in {low}, {high}"


AT_LEAST_0, AT_LEAST_1, FINITE = Bounds(least=0), Bounds(least=1), Bounds()
SEED = Bounds(least=0, most=LIMIT - 1, expected="a whole number from 0 to 2^64 - 1")


def setting(
    default: Any,
    text: str = "",
    *,
    group: str = "",
    choices: Collection[str] = (),
    suggestions: Collection[str] = (),
    metavar: str = "",
    aliases: Sequence[str] = (),
    **bounds: Any,
) -> Any:
    """Declare a field of a settings dataclass, which may also be an option of a command.

    Args:
        text: What `--help` says of the option, if it is one.
        group: Heading that `--help` lists it under.
        choices: Accepted names, of a text or of each of several. The default may be another text.
        suggestions: Names that the shell offers where others are accepted too.
        metavar: Name of the value in `--help`.
        aliases: Other names of the option.
        bounds: `Bounds` of a number, or of each of several.
    """
    metadata = {"bounds": Bounds(**bounds), "choices": choices, "text": text, "group": group}
    metadata |= {"suggestions": suggestions, "metavar": metavar, "aliases": aliases}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_mapping(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as a mapping, whose values are numbers or lists of numbers as in JSON, or raise ValueError."""
    mapping = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            mapping[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{text!r}; expected NAME=NUMBER") from error
    return mapping


def setting_texts(settings: type) -> dict[str, tuple[str, str]]:
    """Heading and text of each field of a settings dataclass, from the docstrings of the class and its bases.

    The heading is the first line of the docstring, up to `:` or `.`. The text is that of the attribute, of which
    `a, b: text` is several.
    """
    texts: dict[str, tuple[str, str]] = {}
    for owner in settings.__mro__:
        doc = inspect.cleandoc(owner.__doc__ or "")
        attributes = re.split(r"\n(?=    \w)", doc.partition("Attributes:")[2])
        for names, _, text in (part.strip().partition(": ") for part in attributes):
            for name in names.split(", "):
                texts.setdefault(name, (re.split("[:.]", doc, maxsplit=1)[0], " ".join(text.split())))
    return texts


def check_settings(settings: Any) -> None:
    """Check the type, bounds and names of every field, then by `check_together` of each class that defines it.

    A class may define the method `check_together` for values that exclude each other; base classes come first.

    Raises:
        ValueError: Naming the first that is wrong, with the nearest name.
    """
    check_types(settings)
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), field.metadata.get("choices")
        bounds = field.metadata.get("bounds", FINITE)
        items = value if isinstance(value, list | tuple) else (value,)
        shown = ",".join(map(str, items))
        for item in items:
            if isinstance(item, int | float):
                require(bounds.allow(item), field.name, shown, str(bounds))
            if choices and item != field.default:
                which = "one" if item is value else "some"
                expected = f"{which} of {', '.join(choices)}{nearest(str(item), choices)}"
                require(item in choices, field.name, repr(item), expected)
    for owner in reversed(type(settings).__mro__):
        if check := vars(owner).get("check_together"):
            check(settings)
