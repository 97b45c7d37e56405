"""`reference/settings.md`: every setting of training, evaluation and build, from the settings dataclasses."""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from markdown_text import as_markdown, directive

from stepfuse.data.settings_fields import FINITE, setting_texts
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.recipes.build_set import BuildConfig
from stepfuse.train.distill_settings import DistillSettings
from stepfuse.train.settings import SETTINGS, TrainSettings

TRAINING: dict[str, type[TrainSettings]] = {**SETTINGS, "distill": DistillSettings}
OTHERS: dict[str, type] = {"evaluate": EvaluationConfig, "build": BuildConfig}
WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", list: "list", dict: "mapping"}
PLURALS = {int: "integers", float: "numbers", str: "texts"}


def setting_id(settings: type, name: str) -> str:
    """The name of a setting in the site: `train.seed` if DPO and DDPO share it, else `dpo.margin`."""
    for program, kind in OTHERS.items():
        if settings is kind:
            return f"{program}.{name}"
    assert issubclass(settings, TrainSettings)
    own = settings.program if name in _own_names(settings) else "train"
    return f"{own}.{name}"


def settings() -> str:
    """The sections of the page, in Markdown."""
    shared = list(fields(TrainSettings))
    parts = ["## Training", "Settings that `train/dpo.py` and `train/ddpo.py` have in common."]
    parts += _sections(TrainSettings, shared, depth="###")
    for kind in TRAINING.values():
        parts += [f"## {_TITLES[kind.program][0]}", _TITLES[kind.program][1]]
        parts += _sections(kind, [field for field in fields(kind) if field.name in _own_names(kind)], depth="")
    taken = sorted(DistillSettings.fixed - {"adapter_set"}, key=[field.name for field in shared].index)
    names = ", ".join(f"{{setting}}`{name} <{setting_id(DistillSettings, name)}>`" for name in taken)
    parts += [f"The set decides the following settings, which are therefore no flags of distillation: {names}."]
    for program, kind in OTHERS.items():
        parts += [f"## {_TITLES[program][0]}", _TITLES[program][1], *_sections(kind, fields(kind), depth="")]
    return "\n\n".join(parts)


_TITLES = {
    "dpo": ("Step-level DPO", "Settings of `train/dpo.py`, besides those [in common](#training)."),
    "ddpo": ("DDPO", "Settings of `train/ddpo.py`, besides those [in common](#training)."),
    "distill": ("Distillation", "Settings of `train/distill.py`, besides those [in common](#training)."),
    "evaluate": ("Evaluation", "Settings of the YAML file of `stepfuse evaluate SET --config FILE`."),
    "build": ("Build", "Settings of the YAML file of `stepfuse build FILE`."),
}


def _own_names(settings: type[TrainSettings]) -> set[str]:
    """Settings that the others do not have, or whose default or bounds differ from theirs."""
    names = {field.name for field in fields(settings)} - {field.name for field in fields(TrainSettings)}
    return names | {name for name in vars(settings).get("__annotations__", ()) if name in _instance_names(settings)}


def _instance_names(settings: type) -> set[str]:
    return {field.name for field in fields(settings)}


def _sections(settings: type, shown: Sequence[Field], *, depth: str) -> Iterator[str]:
    """The settings, under the headings of the classes that define them if `depth` is that of a heading."""
    hints, texts, before = get_type_hints(settings), setting_texts(settings), ""
    for field in shown:
        heading, text = texts[field.name]
        if depth and heading != before:
            yield f"{depth} {heading}"
            before = heading
        argument = f"{setting_id(settings, field.name)} | {_accepted(field, hints[field.name])} | {_default(field)}"
        yield directive("setting", argument, as_markdown(text))


def _accepted(field: Field, hint: Any) -> str:
    """The type of a setting with its bounds or its choices, in words."""
    kind, bounds = _kind(hint), field.metadata.get("bounds", FINITE)
    if choices := field.metadata.get("choices"):
        return f"one of {', '.join(choices)}"
    if bounds == FINITE:
        return kind
    return str(bounds) if str(bounds).startswith(("a ", "an ", "two ")) else f"{kind}, {bounds}"


def _kind(hint: Any) -> str:
    """A type in words."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(part) if part == "" else str(part) for part in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return f"list of {PLURALS[inner[0]]}"
    if inner and len(inner) < len(get_args(hint)):
        return _kind(inner[0])
    return WORDS[hint]


def _default(field: Field) -> str:
    """A default as it would be written in YAML; a dash if the setting is unset."""
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]" if value else "-"
    return "-" if value in (None, "", {}) else f"{value:g}" if isinstance(value, float) else str(value)
