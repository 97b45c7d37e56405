"""Checks of arguments that need no torch, so that an invalid one is reported at once.

Each raises a ValueError that names the value and what was expected.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from stepfuse.data.names import near_names, nearest, suggestion
from stepfuse.data.output_file import require_new_file
from stepfuse.fuse.rules.options import RULE_OPTIONS
from stepfuse.fuse.rules.registry import check_rule_name, is_user_code
from stepfuse.fuse.rules.weights import Weights, WeightSchedule, label_weights, parse_weights

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "mlu", "musa", "xla")
RULE_FLAGS = {field.name: rule for rule, options in RULE_OPTIONS.items() for field in fields(options)}


def check_picture(file: Path, *, overwrite: bool, flag: str = "--output") -> None:
    from PIL import Image

    require_new_file(file, overwrite=overwrite, option=flag)
    known = Image.registered_extensions()
    if known.get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{flag} {file}; expected the name of a picture, such as out.png or out.jpg")


def check_safetensors(file: Path, *, overwrite: bool) -> None:
    if file.suffix != ".safetensors":
        raise ValueError(f"--output {file}; expected a name that ends in .safetensors")
    require_new_file(file, overwrite=overwrite)


def check_device_name(name: str) -> None:
    """Check the spelling of a torch device; whether it exists is known to torch."""
    kind = name.partition(":")[0]
    if kind not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise ValueError(f"--device {name!r}; expected cpu, cuda, cuda:1 or another device{nearest(kind, DEVICES)}")


def check_texts(texts: Iterable[str]) -> None:
    if any(not text.strip() for text in texts):
        raise ValueError("an empty --prompt; give some words")


def check_rule(name: str, options: Mapping[str, Any]) -> None:
    """Check the name of a fusion rule and the options that are given for it."""
    try:
        check_rule_name(name)
    except ValueError as error:
        raise ValueError(f"--rule: {error}") from error
    for option in options:
        if RULE_FLAGS[option] != name and not is_user_code(name):  # whose options are known once it is loaded
            owner = f"--{option} is an option of the rule {RULE_FLAGS[option]}"
            raise ValueError(f"rule {name} has no option {option!r}; {owner}")


def check_set(given: Path, *, oracles: bool = False, instead: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Check that an adapter set exists: a folder, the name of a bundled set, or a hub id.

    Args:
        oracles: Whether to return the names of oracle adapters too.
        instead: Other words that may have been meant.

    Returns:
        The names of its adapters, as far as they can be read here; None for a set on the hub, which is not downloaded.
    """
    from stepfuse.fuse.sets.manifest import EMBEDDED_SETS, MANIFEST, adapter_entries, read_versioned
    from stepfuse.fuse.sets.wrong_source import base_model, check_is_set, known_base, near_sets

    name, folder = str(given), given
    if name in EMBEDDED_SETS and not (folder / MANIFEST).exists():
        folder = EMBEDDED_SETS[name]
    if not folder.exists():
        from stepfuse.fuse.sets.hub import parse_id

        # An id of the hub may well have the name of a bundled set after its owner.
        bundled_or_other = [] if "/" in name else near_names(name, [*EMBEDDED_SETS, *instead])[:1]
        near = suggestion([*bundled_or_other, *near_sets(folder)])
        if parse_id(name) is None:
            if known := known_base(name):
                raise ValueError(base_model(name, known))
            bundled = " or ".join(EMBEDDED_SETS)
            raise ValueError(
                f"no adapter set {name!r}; expected a folder with {MANIFEST}, a hub id OWNER/NAME, or {bundled}{near}"
            )
        if near and "@" not in name:
            raise ValueError(f"no folder {name!r}{near} (for a repository of the hub: {name}@main)")
        return None
    check_is_set(folder)
    values = read_versioned(folder / MANIFEST, "an adapter set, as written by `stepfuse set create`")
    try:
        entries = adapter_entries(values) if oracles else values["adapters"]
        return tuple(str(adapter["name"]) for adapter in entries)
    except (KeyError, TypeError):
        return None  # a malformed manifest: loading it explains what is wrong


def check_weights(texts: Sequence[str], names: Sequence[str] | None) -> list[Weights]:
    """Weights by objective, of each text as the command line gives it, `A=0.7,B=0.3`.

    Args:
        names: The objectives of the set, or None if they are not known yet.
    """
    try:
        parsed: list[Weights] = [parse_weights(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--weights: {error}") from error
    for weights in parsed:
        for name in weights:
            if names is not None and name not in names:
                known = ", ".join(names)
                raise ValueError(f"--weights: no objective {name!r}; the set has {known}{nearest(name, names)}")
        numbers = [value for value in weights.values() if not isinstance(value, WeightSchedule)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"--weights {label_weights(weights)}: expected finite numbers")
        if len(numbers) == len(weights) and sum(numbers) <= 0:
            raise ValueError(f"--weights {label_weights(weights)} sum to {sum(numbers):g}; expected a positive sum")
    return parsed
