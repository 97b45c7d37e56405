"""Checks of a command's arguments that need no torch, so that a wrong one is refused at once.

Each raises a ValueError that names the value and what was expected.
"""

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepfuse.data import output_folder
from stepfuse.data.names import nearest
from stepfuse.fuse.rules.weights import Weights, WeightSchedule, label_weights, parse_weights
from stepfuse.scripts.cli.choices import (
    DEVICES,
    EMBEDDED_SETS,
    PROMPT_SET_NAMES,
    REWARD_NAMES,
    RULE_NAMES,
    RULE_OPTIONS,
)

LARGEST_SEED = 2**64 - 1
LOST_AND_FOUND = "lost+found"  # in the root folder of an ext4 volume, which may be a mounted output folder
UNFINISHED = ".stepfuse-replace"  # of an interrupted replacement of a folder's content, which the command completes
AT_LEAST_1 = (
    *("steps", "batch_size", "rows_at_once", "height", "width", "candidates", "block_size", "images", "repeats"),
    *("count", "threads", "rank", "resolution", "timesteps_per_forward"),
)
BOUNDS: dict[str, tuple[float, float]] = dict.fromkeys(AT_LEAST_1, (1, math.inf)) | {
    "seed": (0, LARGEST_SEED),
    "port": (0, 65535),
    "enlarge": (1, 64),
    "strength": (0, math.inf),
    "gate": (0, math.inf),
    "guidance_scale": (-math.inf, math.inf),
    "eta": (0, 1),
    "reference_eta": (0, 1),
    "timestep_fraction": (0, 1),
}


def check_numbers(arguments: argparse.Namespace) -> None:
    """Check every number of a command against the bounds of its name."""
    for name, value in vars(arguments).items():
        if name in BOUNDS and isinstance(value, int | float):
            least, most = BOUNDS[name]
            if not (least <= value <= most and math.isfinite(value)):
                raise ValueError(f"--{name} {value}; expected {_range(least, most)}")


def _range(least: float, most: float) -> str:
    if most == LARGEST_SEED:
        return "a whole number from 0 to 2^64 - 1"
    if most < math.inf:
        return f"a number from {least:g} to {most:g}"
    return f"{least:g} or more" if least > -math.inf else "a finite number"


def check_interval(text: str) -> tuple[float, float]:
    """`0.2-0.8` → (0.2, 0.8)."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*-\s*([0-9.]+)\s*", text)
    try:
        begin, end = (float(part) for part in match.groups()) if match else (1.0, 0.0)
    except ValueError:
        begin, end = 1.0, 0.0
    if not 0 <= begin < end <= 1:
        raise ValueError(f"--guidance_interval {text!r}; expected two shares of the steps in order, such as 0.2-0.8")
    return begin, end


def check_file(file: Path, *, overwrite: bool, flag: str = "--output") -> None:
    """Check that a file can be written: its folder can be made, and it is new or may be replaced."""
    if file.is_dir():
        raise ValueError(f"{flag} {file} is a folder; expected the name of a file")
    if file.exists() and not overwrite:
        raise ValueError(f"{flag} {file} exists; choose another {flag} or pass --overwrite")
    check_parents(file, flag)
    output_folder.check_file(file, overwrite=overwrite, option=flag)


def check_parents(path: Path, flag: str = "--output") -> None:
    """Check that the folders above a path exist or can be made."""
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"{flag} {path}: {parent} is a file; expected a folder")
            return


def check_folder(folder: Path, *, overwrite: bool, continued: str | None = None, flag: str = "output folder") -> None:
    """Check that an output folder is new, empty, or may be replaced.

    Args:
        folder: The output folder.
        overwrite: Whether its content may be replaced.
        continued: Name of a file that marks a run which the command continues.
        flag: What the command calls the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file; choose another")
    check_parents(folder, flag)
    output_folder.resolve_folder(folder)
    if overwrite or not folder.is_dir() or (folder / UNFINISHED).exists():
        return
    if all(content.name == LOST_AND_FOUND for content in folder.iterdir()):
        return
    if continued is None or not (folder / continued).exists():
        raise ValueError(f"{flag} {folder} exists and is not empty; choose another or pass --overwrite")


def check_picture(file: Path, *, overwrite: bool = True, flag: str = "--output") -> None:
    """Check that a picture can be saved under this name."""
    from PIL import Image

    check_file(file, overwrite=overwrite, flag=flag)
    known = Image.registered_extensions()
    if known.get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{flag} {file}; expected the name of a picture, such as out.png or out.jpg")


def check_device_name(name: str | None) -> None:
    """Check the spelling of a torch device; whether it exists is known to torch."""
    if name is None:
        return
    match = re.fullmatch(r"(?P<kind>[a-z]+)(:\d+)?", name)
    if match is None or match["kind"] not in DEVICES:
        kind = name.partition(":")[0]
        raise ValueError(f"--device {name!r}; expected cpu, cuda, cuda:1 or another device{nearest(kind, DEVICES)}")


def check_texts(texts: Iterable[str], flag: str = "--prompt") -> None:
    """Check that no prompt is empty."""
    if any(not text.strip() for text in texts):
        raise ValueError(f"an empty {flag}; give some words")


def check_rule(name: str | None, options: Mapping[str, Any]) -> None:
    """Check the name of a fusion rule and the options that are given for it; None is the rule of a set."""
    if name is None:
        return
    if name not in RULE_NAMES:
        known = ", ".join(RULE_NAMES)
        raise ValueError(f"--rule: no fusion rule {name!r}; expected one of {known}{nearest(name, RULE_NAMES)}")
    for option in options:
        if option not in RULE_OPTIONS.get(name, ()):
            owner = next(rule for rule, known in RULE_OPTIONS.items() if option in known)
            raise ValueError(f"rule {name} has no option {option!r}; --{option} is an option of the rule {owner}")


def check_names(given: Sequence[str], known: Sequence[str], flag: str) -> None:
    """Check names that are separated by commas."""
    for name in given:
        if name not in known:
            raise ValueError(f"{flag} {name!r}; expected some of {', '.join(known)}{nearest(name, known)}")


def check_reward(name: str) -> None:
    """Check that a reward's name is known, or that its file exists."""
    kind = name.partition(":")[0]
    if kind in (*REWARD_NAMES, "http", "https"):
        return
    is_code, is_settings = ".py:" in name, name.endswith((".yaml", ".yml"))
    if is_code or is_settings:
        file = Path(name.rsplit(":", 1)[0] if is_code else name)
        if not file.is_file():
            raise ValueError(f"no reward {name!r}: no file {str(file)!r}")
        return
    if name.endswith(".py"):
        raise ValueError(f"no reward {name!r}; expected the function too: {name}:FUNCTION")
    raise ValueError(
        f"no reward {kind!r}; expected one of {', '.join(REWARD_NAMES)}, path/to/file.py:function, path/to/file.yaml "
        f"or http://HOST:PORT{nearest(kind, REWARD_NAMES)}"
    )


def check_prompts(source: str | None) -> None:
    """Check that prompts are a file or the name of a prompt set, either with `:COUNT` or without."""
    if source is None or source in PROMPT_SET_NAMES or Path(source).is_file():
        return
    name, colon, count = source.rpartition(":")
    if not colon or (name not in PROMPT_SET_NAMES and not Path(name).is_file()):
        asked = name if colon else source
        known = ", ".join(PROMPT_SET_NAMES)
        raise ValueError(
            f"no prompts {asked!r}; expected a text file with one prompt per line, or one of {known}"
            f"{nearest(asked, PROMPT_SET_NAMES)}"
        )
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"prompts {source!r}: the count is {count!r}; expected a whole number of 1 or more")


def check_set(given: Path | str, *, oracles: bool = False, instead: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Check that an adapter set exists.

    Args:
        given: A folder, the name of an embedded set, or a hub id.
        oracles: Whether the names of oracle adapters are wanted too.
        instead: Other words that may have been meant.

    Returns:
        The names of its adapters, as far as they can be read here; None for a set on the hub, which is not asked.
    """
    from stepfuse.fuse.sets.hub import parse_id
    from stepfuse.fuse.sets.manifest import MANIFEST, read_json

    folder = Path(given)
    if str(given) in EMBEDDED_SETS and not (folder / MANIFEST).exists():
        folder = EMBEDDED_SETS[str(given)]
    if not folder.exists():
        near = nearest(str(given), [*EMBEDDED_SETS, *instead, *neighbours(folder)])
        if parse_id(str(given)) is not None:
            if near and folder.parent.is_dir() and "@" not in str(given):
                raise ValueError(f"no folder {str(given)!r}{near} (for a repository of the hub: {given}@main)")
            return None
        raise ValueError(
            f"no adapter set {str(given)!r}; expected a folder with {MANIFEST}, a hub id OWNER/NAME, or emoji{near}"
        )
    values = read_json(folder / MANIFEST, "an adapter set, as written by `stepfuse set create`")
    try:
        entries = [*values["adapters"]]
        if oracles:
            entries += [oracle["adapter"] for oracle in values.get("oracles", [])]
        return tuple(str(adapter["name"]) for adapter in entries)
    except (KeyError, TypeError):
        return None  # a malformed manifest: loading it tells what is wrong


def neighbours(path: Path) -> list[str]:
    """Folders beside a path that does not exist, written as the path is."""
    try:
        return [str(path.with_name(other.name)) for other in path.parent.iterdir() if other.is_dir()]
    except (OSError, ValueError):
        return []


def check_weights(texts: Sequence[str], names: Sequence[str] | None) -> list[Weights]:
    """Check weights as the command line gives them.

    Args:
        texts: `A=0.7,B=0.3` each.
        names: The objectives of the set, or None if they are not known yet.

    Returns:
        The weights by objective.
    """
    parsed: list[Weights] = []
    for text in texts:
        weights: Weights = parse_weights(text)
        for name in weights:
            if names is not None and name not in names:
                known = ", ".join(names)
                raise ValueError(f"--weights: no objective {name!r}; the set has {known}{nearest(name, names)}")
        numbers = [value for value in weights.values() if not isinstance(value, WeightSchedule)]
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError(f"--weights {label_weights(weights)}: expected finite numbers")
        if len(numbers) == len(weights) and sum(numbers) <= 0:
            raise ValueError(f"--weights {label_weights(weights)} sum to {sum(numbers):g}; expected a positive sum")
        parsed.append(weights)
    return parsed


def check_objective(name: str | None, names: Sequence[str] | None, given: Path) -> None:
    """Check that a set has an adapter; None is all of them."""
    if name is not None and names is not None and name not in names:
        raise ValueError(f"set {given} has no adapter {name!r}; it has {', '.join(names)}{nearest(name, names)}")


def check_set_folder(given: Path) -> None:
    """Check that a set is in a folder that can be written, and neither embedded nor on the hub."""
    known = check_set(given)
    if not given.exists() and (str(given) in EMBEDDED_SETS or known is None):
        raise ValueError(f"set {str(given)!r} is not in a folder; copy it to one: stepfuse pull {given} FOLDER")


def check_adapter_folders(folders: Iterable[Path]) -> None:
    """Check that adapters were written by training, or are those of a set."""
    from stepfuse.fuse.sets.manifest import MANIFEST

    for folder in folders:
        if not folder.is_dir():
            near = nearest(str(folder), neighbours(folder))
            raise ValueError(f"no adapter in {folder}; expected a folder, as written by training{near}")
        if not (folder / "objective.json").is_file() and not (folder.parent / MANIFEST).is_file():
            raise ValueError(
                f"no adapter in {folder}: it has no objective.json, which training writes; `stepfuse set import` takes "
                "a LoRA of another tool"
            )


def check_export(output: Path, objective: str | None, form: str, *, overwrite: bool) -> None:
    """Check the output of an export: a file for one adapter, except in peft's format, and a folder for all."""
    if form != "peft" and objective is not None:
        if output.suffix != ".safetensors":
            raise ValueError(f"--output {output}; expected a name that ends in .safetensors")
        check_file(output, overwrite=overwrite)
    elif output.is_file():
        what = "all adapters are written into a folder; name one adapter for one file" if objective is None else form
        raise ValueError(f"--output {output} is a file; expected a folder ({what})")
    else:
        check_parents(output)


def check_lora(source: str) -> None:
    """Check that a LoRA is a file or folder, or may be on the hub."""
    from stepfuse.fuse.sets.hub import parse_id

    if not Path(source).exists() and parse_id(source) is None:
        raise ValueError(f"no LoRA at {source!r}; expected a safetensors file, a folder of a peft adapter, or a hub id")


def check_objective_name(name: str) -> None:
    """Check that a name can be written in weights and be the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"--objective {name!r}; expected letters, digits, '_' and '-'")
