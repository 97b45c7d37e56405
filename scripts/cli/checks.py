"""Checks of arguments that need no torch, so that an invalid one is reported at once.

Each raises a ValueError that names the value and what was expected.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfuse.data.names import nearest
from stepfuse.data.output_file import require_new_file
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.scripts.cli.names import embedded_sets, reward_names

if TYPE_CHECKING:
    from stepfuse.fuse.rules.weights import Weights

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "mlu", "musa", "xla")


def check_picture(file: Path, *, overwrite: bool, flag: str = "--output") -> None:
    """Check that a picture can be saved under this name."""
    from PIL import Image

    require_new_file(file, overwrite=overwrite, option=flag)
    known = Image.registered_extensions()
    if known.get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{flag} {file}; expected the name of a picture, such as out.png or out.jpg")


def check_safetensors(file: Path, *, overwrite: bool) -> None:
    """Check that a safetensors file can be written under this name."""
    if file.suffix != ".safetensors":
        raise ValueError(f"--output {file}; expected a name that ends in .safetensors")
    require_new_file(file, overwrite=overwrite)


def check_device_name(name: str) -> None:
    """Check the spelling of a torch device; whether it exists is known to torch."""
    match = re.fullmatch(r"(?P<kind>[a-z]+)(:\d+)?", name)
    if match is None or match["kind"] not in DEVICES:
        kind = name.partition(":")[0]
        raise ValueError(f"--device {name!r}; expected cpu, cuda, cuda:1 or another device{nearest(kind, DEVICES)}")


def check_texts(texts: Iterable[str]) -> None:
    """Check that no prompt is empty."""
    if any(not text.strip() for text in texts):
        raise ValueError("an empty --prompt; give some words")


def check_rule(name: str | None, options: Mapping[str, Any]) -> None:
    """Check the name of a fusion rule and the options that are given for it; None is the rule of a set."""
    if name is None:
        return
    from stepfuse.fuse.rules.options import RULE_OPTIONS
    from stepfuse.fuse.rules.registry import check_rule_name, is_user_code

    try:
        check_rule_name(name)
    except ValueError as error:
        raise ValueError(f"--rule: {error}") from error
    if is_user_code(name):
        return  # its options are known once it is loaded
    for rule, declared in RULE_OPTIONS.items():
        for field in fields(declared):
            if field.name in options and rule != name:
                owner = f"--{field.name} is an option of the rule {rule}"
                raise ValueError(f"rule {name} has no option {field.name!r}; {owner}")


def check_reward(name: str) -> None:
    """Check that a reward's name is known, or that its file exists."""
    reward, known = parse_reward(name), list(reward_names())
    if reward.path:
        if not Path(reward.path).is_file():
            raise ValueError(f"no reward {name!r}: no file {reward.path!r}")
    elif name.endswith(".py"):
        raise ValueError(f"no reward {name!r}; expected the function too: {name}:FUNCTION")
    elif reward.kind == "catalogue" and reward.head not in known:
        raise ValueError(
            f"no reward {reward.head!r}; expected one of {', '.join(known)}, path/to/file.py:function, "
            f"path/to/file.yaml or http://HOST:PORT{nearest(reward.head, known)}"
        )


def check_set(given: Path, *, oracles: bool = False, instead: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Check that an adapter set exists.

    Args:
        given: A folder, the name of an embedded set, or a hub id.
        oracles: Whether to return the names of oracle adapters too.
        instead: Other words that may have been meant.

    Returns:
        The names of its adapters, as far as they can be read here; None for a set on the hub, which is not downloaded.
    """
    from stepfuse.fuse.sets.hub import parse_id
    from stepfuse.fuse.sets.manifest import MANIFEST, read_versioned

    name, folder = str(given), given
    if name in embedded_sets() and not (folder / MANIFEST).exists():
        folder = embedded_sets()[name]
    if not folder.exists():
        near = nearest(name, [*embedded_sets(), *instead, *siblings(folder)])
        if parse_id(name) is None:
            raise ValueError(
                f"no adapter set {name!r}; expected a folder with {MANIFEST}, a hub id OWNER/NAME, or emoji{near}"
            )
        if near and folder.parent.is_dir() and "@" not in name:
            raise ValueError(f"no folder {name!r}{near} (for a repository of the hub: {name}@main)")
        return None
    values = read_versioned(folder / MANIFEST, "an adapter set, as written by `stepfuse set create`")
    try:
        entries = [*values["adapters"]]
        if oracles:
            entries += [oracle["adapter"] for oracle in values.get("oracles", [])]
        return tuple(str(adapter["name"]) for adapter in entries)
    except (KeyError, TypeError):
        return None  # a malformed manifest: loading it explains what is wrong


def check_set_folder(given: Path) -> None:
    """Check that a set is in a folder that can be written, and neither embedded nor on the hub."""
    known = check_set(given)
    if not given.exists() and (str(given) in embedded_sets() or known is None):
        raise ValueError(f"set {str(given)!r} is not in a folder; copy it to one: stepfuse pull {given} FOLDER")


def siblings(path: Path) -> list[str]:
    """The folders beside a path that does not exist, written as the path is."""
    try:
        return [str(path.with_name(other.name)) for other in path.parent.iterdir() if other.is_dir()]
    except (OSError, ValueError):
        return []


def check_weights(texts: Sequence[str], names: Sequence[str] | None) -> "list[Weights]":
    """Check weights as the command line gives them, `A=0.7,B=0.3` each.

    Args:
        names: The objectives of the set, or None if they are not known yet.

    Returns:
        The weights by objective.
    """
    from stepfuse.fuse.rules.weights import WeightSchedule, label_weights, parse_weights

    parsed: list[Weights] = [parse_weights(text) for text in texts]
    for weights in parsed:
        for name in weights:
            if names is not None and name not in names:
                known = ", ".join(names)
                raise ValueError(f"--weights: no objective {name!r}; the set has {known}{nearest(name, names)}")
        numbers = [value for value in weights.values() if not isinstance(value, WeightSchedule)]
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError(f"--weights {label_weights(weights)}: expected finite numbers")
        if len(numbers) == len(weights) and sum(numbers) <= 0:
            raise ValueError(f"--weights {label_weights(weights)} sum to {sum(numbers):g}; expected a positive sum")
    return parsed
