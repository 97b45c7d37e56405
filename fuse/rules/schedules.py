"""Variance schedules by their kind, as JSON values and as training settings. Importing this does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from stepfuse.data.names import nearest
from stepfuse.data.registry import Registry
from stepfuse.data.stages import import_libraries

if TYPE_CHECKING:
    from stepfuse.fuse.diffusion.variance import VarianceSchedule

SCHEDULES: "Registry[type[VarianceSchedule]]" = Registry(
    {
        "eta": "stepfuse.fuse.diffusion.variance:EtaSchedule",
        "table": "stepfuse.fuse.diffusion.variance:TableSchedule",
        "learned": "stepfuse.fuse.diffusion.variance:LearnedSchedule",
        "share": "stepfuse.fuse.diffusion.share:ShareSchedule",
        "sde": "stepfuse.fuse.diffusion.sde:SDESchedule",
    }
)


def schedule_to_dict(schedule: "VarianceSchedule") -> dict[str, Any]:
    """A schedule as JSON values, `{"kind": "eta", "eta": 0.5}`; a ValueError for a class that is not in `SCHEDULES`."""
    for kind, known in SCHEDULES.items():
        if type(schedule) is known:
            return {"kind": kind} | schedule.to_json()
    raise ValueError(f"{type(schedule).__name__} is not in SCHEDULES; expected one of {', '.join(SCHEDULES)}")


def schedule_label(schedule: "VarianceSchedule") -> str:
    """A schedule in a table: its kind and its values, such as `eta 0.5`."""
    values = schedule_to_dict(schedule)
    numbers = [str(value) for value in values.values() if not isinstance(value, list)]  # the kind is first
    lists = [f", {name} {[round(v, 3) for v in value]}" for name, value in values.items() if isinstance(value, list)]
    return " ".join(numbers) + "".join(lists)


def schedule_from_dict(values: Any) -> "VarianceSchedule":
    """The inverse of `schedule_to_dict`; ValueError for unknown kinds and fields, and for values out of range."""
    kind = str(values.get("kind")) if isinstance(values, dict) else ""
    if kind not in SCHEDULES:
        raise ValueError(
            f"variance schedule {values!r}; expected a `kind` of {', '.join(SCHEDULES)}{nearest(kind, SCHEDULES)}"
        )
    schedule = SCHEDULES[kind]
    given = {name: value for name, value in values.items() if name != "kind"}
    known = schedule.field_names()
    for name in sorted(set(given) - set(known)):
        raise ValueError(f"variance schedule {kind!r} has no {name!r}; it has {', '.join(known)}{nearest(name, known)}")
    if missing := _missing(schedule, known, given):
        raise ValueError(f"variance schedule {kind!r} needs {missing}; it has {', '.join(known)}")
    try:
        return schedule.from_json(given)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"variance schedule {values!r}: {error}") from error


def initial_schedule(kind: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> "VarianceSchedule":
    """The schedule that training starts from, by the settings of the run and its `variance_options`.

    Raises:
        ValueError: for options that the kind does not have, that are missing or that cannot be trained with.
    """
    import_libraries()  # the settings of a training are the first to need them

    from stepfuse.fuse.diffusion.variance import ScheduleOption

    schedule = SCHEDULES[kind]
    known = schedule.options or dict.fromkeys(schedule.field_names(), ScheduleOption())
    free = [name for name, option in known.items() if not option.setting]
    for name in sorted(set(options) - set(free)):
        raise ValueError(
            f"variance_options has {name!r}; expected {', '.join(free) or 'none'} for variance {kind}"
            f"{nearest(name, free)}"
        )
    given = {name: settings[option.setting] for name, option in known.items() if option.setting} | dict(options)
    described = [f"{name} ({known[name].help})" if known[name].help else name for name in free]
    if missing := _missing(schedule, free, given):
        raise ValueError(f"variance {kind} needs {missing} among variance_options; expected {', '.join(described)}")
    try:
        for name, value in given.items():
            option = known[name]
            if not option.valid(value):
                raise ValueError(f"{option.setting or name} is {value}; expected {option.expected}")
        return schedule.initial(**given)
    except TypeError as error:  # a text for a number
        raise ValueError(f"variance_options of variance {kind}: {error}; expected {', '.join(described)}") from error


def _missing(schedule: "type[VarianceSchedule]", names: Sequence[str], given: Mapping[str, Any]) -> str:
    """Those of these fields that are neither given nor have a default, as a text."""
    needed = {field.name for field in fields(schedule) if field.default is MISSING}
    return ", ".join(name for name in names if name in needed and name not in given)
