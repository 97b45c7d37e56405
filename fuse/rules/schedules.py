"""Variance schedules by their kind, and as JSON values."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from stepfuse.data.names import nearest
from stepfuse.fuse.diffusion.variance import EtaSchedule, LearnedSchedule, TableSchedule, VarianceSchedule

SCHEDULES: dict[str, type] = {
    "eta": EtaSchedule,
    "table": TableSchedule,
    "learned": LearnedSchedule,
}


FROM_JSON: dict[str, Callable[[Any], Any]] = {  # fields whose values JSON cannot hold
    "etas": tuple,
    "offsets": lambda values: torch.tensor(values, dtype=torch.float32),
}


def schedule_to_dict(schedule: VarianceSchedule) -> dict[str, Any]:
    """A schedule as plain JSON values: its kind in `SCHEDULES` and its fields, `{"kind": "eta", "eta": 0.5}`."""
    for kind, build in SCHEDULES.items():
        if type(schedule) is build:
            values = {name: getattr(schedule, name) for name in _field_names(build)}
            return {"kind": kind} | {name: _plain(value) for name, value in values.items()}
    raise ValueError(f"{type(schedule).__name__} is not in SCHEDULES; expected one of {', '.join(SCHEDULES)}")


def schedule_from_dict(values: dict[str, Any]) -> VarianceSchedule:
    """The inverse of `schedule_to_dict`.

    Raises:
        ValueError: for an unknown kind, or fields it does not have.
    """
    if not isinstance(values, dict) or values.get("kind") not in SCHEDULES:
        kind = values.get("kind") if isinstance(values, dict) else values
        raise ValueError(
            f"variance schedule {values!r}; expected a `kind` of {', '.join(SCHEDULES)}{nearest(kind, SCHEDULES)}"
        )
    build = SCHEDULES[values["kind"]]
    given = {name: value for name, value in values.items() if name != "kind"}
    unknown = sorted(set(given) - set(_field_names(build)))
    if unknown:
        known = _field_names(build)
        raise ValueError(
            f"variance schedule {values['kind']!r} has no {unknown[0]!r}; it has {', '.join(known)}"
            f"{nearest(unknown[0], known)}"
        )
    try:
        return build(**{name: FROM_JSON.get(name, lambda v: v)(value) for name, value in given.items()})
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"variance schedule {values!r}: {error}") from error


def _field_names(build: type) -> list[str]:
    return [field.name for field in fields(build)]


def _plain(value: object) -> object:
    """Tensors and tuples as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
