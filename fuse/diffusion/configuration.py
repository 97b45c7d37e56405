"""Checks of a component's configuration: what changes the computation is handled, or refused by its name."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expected:
    """The values of a configuration key that are supported.

    Attributes:
        values: all of them.
        reason: why others are not, and what to do instead.
    """

    values: tuple[Any, ...]
    reason: str


def check_configuration(
    name: str, component: Any, *, handled: Collection[str], expected: Mapping[str, Expected]
) -> None:
    """Check every configuration key of a diffusers component.

    Keys that the component's class does not take are ignored, as diffusers ignores them. A key that is in neither list,
    of a later diffusers for instance, must have its default.

    Args:
        name: what the component is called in errors, `vae` for instance.
        component: a model or scheduler with a `config`.
        handled: keys of which every value is supported.
        expected: keys of which only some values are.

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
