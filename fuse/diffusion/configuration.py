"""Checks of a component's configuration: what changes the computation is handled, or refused by its name."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expected:
    """All supported values of a configuration key, and why others are not, with what to do instead."""

    values: tuple[Any, ...]
    reason: str


def check_configuration(
    name: str, component: Any, *, handled: Collection[str], expected: Mapping[str, Expected]
) -> None:
    """Check every configuration key of a diffusers component, which errors call `name`.

    Of the keys in `handled` every value is supported, of those in `expected` some are. A key in neither, of a later
    diffusers for instance, must have its default; keys that the component's class does not take are ignored, as
    diffusers ignores them.

    Raises:
        ValueError: naming the key, its value and what is expected.
    """
    for key, parameter in inspect.signature(type(component).__init__).parameters.items():
        if key not in component.config or key in handled:
            continue
        value = component.config[key]
        if key in expected:
            if _plain(value) not in map(_plain, expected[key].values):
                values = " or ".join(map(repr, expected[key].values))
                raise ValueError(f"{name} has {key} {value!r}; expected {values}: {expected[key].reason}")
        elif _plain(value) != _plain(parameter.default):
            raise ValueError(
                f"{name} has {key} {value!r}, which this version of stepfuse does not know; expected its default, "
                f"{parameter.default!r}"
            )


def _plain(value: Any) -> Any:
    """Tuples as lists, which they are once they went through JSON."""
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
