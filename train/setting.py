"""Settings: bounds and help of the fields of a dataclass. Importing this module does not import torch."""

import dataclasses
import inspect
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from stepfuse.data.names import nearest
from stepfuse.data.settings_file import check_types, require


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of a number, or none.

    Attributes:
        least, above: lower bound, inclusive or exclusive.
        most, below: upper bound, inclusive or exclusive.
        expected: the bounds in words; by default an interval.
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    expected: str = ""

    def allow(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low = f"({self.above:g}" if self.least == -math.inf else f"[{self.least:g}"
        high = f"{self.below:g})" if self.most == math.inf else f"{self.most:g}]"
        at_least = "a positive number" if self.least == -math.inf else f"{self.least:g} or more"
        return self.expected or (at_least if high == "inf)" else f"a number in {low}, {high}")


def setting(default: Any, *, choices: Collection[str] = (), **bounds: Any) -> Any:
    """Declare a field with `Bounds`, with names to choose from, or with a list or mapping as its default."""
    metadata = {"bounds": Bounds(**bounds), "choices": choices}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(settings: Any) -> None:
    """Check the type and bounds of every field.

    Raises:
        ValueError: naming the first that is wrong.
    """
    check_types(settings)
    for field in dataclasses.fields(settings):
        value, bounds, choices = getattr(settings, field.name), *map(field.metadata.get, ("bounds", "choices"))
        if isinstance(value, int | float):
            require(bounds is None or bounds.allow(value), field.name, value, str(bounds))
            require(math.isfinite(value), field.name, value, "a finite number")
        if choices:
            expected = f"one of {', '.join(choices)}{nearest(value, choices)}"
            require(value in choices, field.name, repr(value), expected)


def help_texts(settings: type) -> dict[str, tuple[str, str]]:
    """Heading and help of each field: the first line of its class's docstring, up to `:` or `.`, and its attribute."""
    texts = {}
    for owner in settings.__mro__:
        doc = inspect.cleandoc(owner.__doc__ or "")
        attributes = re.split(r"\n(?=    \w)", doc.partition("Attributes:")[2])
        for name, _, text in (part.strip().partition(": ") for part in attributes):
            texts[name] = (re.split("[:.]", doc, maxsplit=1)[0], " ".join(text.split()))
    return texts
