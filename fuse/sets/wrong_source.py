"""Messages for paths and names that are not an adapter set or an adapter. Nothing here imports torch."""

import re
from functools import cache
from pathlib import Path

from stepfuse.configs import FOLDER
from stepfuse.data import emoji
from stepfuse.data.checkpoint_folders import is_checkpoint, list_checkpoints
from stepfuse.data.names import suggestion
from stepfuse.data.near_folders import near_folders
from stepfuse.data.text_files import file_name
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.manifest import MANIFEST, OBJECTIVE

PIPELINE = "model_index.json"  # of a base model, which diffusers writes
TRAIN = "python -m stepfuse.train.dpo --pretrained_model_name_or_path"


def check_is_set(folder: Path) -> None:
    """Raise ValueError for a path without a manifest; it says what the path is instead, or which folder is a set."""
    name = file_name(folder)
    if is_set(folder):
        return
    if folder.is_file():
        raise ValueError(f"{name} is a file; expected the folder of an adapter set")
    if (folder / PIPELINE).is_file():
        raise ValueError(base_model(name))
    if near := near_sets(folder):
        what = "the adapter set in it is" if len(near) == 1 else "the adapter sets in it are"
        raise ValueError(f"no {MANIFEST} in {name}; {what} {', '.join(near)}")
    if holds_adapters(folder):
        raise ValueError(
            f"no {MANIFEST} in {name}: it holds adapters, not a set; `stepfuse set create FOLDER --adapter {name}` "
            "makes a set of them"
        )
    raise ValueError(f"no {MANIFEST} in {name}; expected an adapter set, as written by `stepfuse set create`")


def base_model(name: str, known_as: str | None = None) -> str:
    """The message for a base model where a set was expected.

    Args:
        known_as: The name that it is loaded by, if that is another one.
    """
    name = name.partition("@")[0]  # of an id of the hub: `--pretrained_model_name_or_path` takes no revision
    what = "is a base model, not an adapter set"
    if known_as not in (None, name):
        what = f"is the name of the base model {known_as!r}, not of an adapter set"
    return (
        f"{name!r} {what}; train adapters on it (`{TRAIN} {known_as or name} …`), and make a set of them: "
        "`stepfuse set create`"
    )


def known_base(name: str) -> str | None:
    """The base model of the package, or of a packaged configuration, that has a name, whoever its owner is."""
    return name if name in emoji.BASES else _published_bases().get(name.partition("@")[0].rpartition("/")[2])


def check_has_adapters(folder: Path) -> None:
    """Raise ValueError for a path without an adapter; it says which folder has some."""
    if holds_adapters(folder):
        return
    name, near = file_name(folder), near_folders(folder, holds_adapters)
    if not folder.is_dir():
        raise ValueError(f"no adapter in {name}; expected a folder, as written by training{suggestion(near)}")
    if near:
        raise ValueError(f"no adapter in {name}; adapters are in {', '.join(near)}")
    if run := run_of_checkpoints(folder):
        if holds_adapters(run):
            raise ValueError(f"no adapter in {name}, a checkpoint; what was trained is in {file_name(run)}")
        raise ValueError(
            f"no adapter in {name}: the training in {file_name(run)} has not ended; continue it with "
            "--resume_from_checkpoint latest, which writes the adapter at the end"
        )
    raise ValueError(
        f"no adapter in {name}: it has no {OBJECTIVE}, which training writes; `stepfuse set import` takes a LoRA of "
        "another tool"
    )


def run_of_checkpoints(folder: Path) -> Path | None:
    """The folder of the training whose checkpoints a folder holds, or that it is a checkpoint of."""
    if list_checkpoints(folder):
        return folder
    if not is_checkpoint(folder):
        return None
    return folder.parent if folder.parent.name else folder.absolute().parent


def near_sets(folder: Path) -> list[str]:
    """The folders of sets that may have been meant by a path that is none."""
    return near_folders(folder, is_set)


def is_set(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def holds_adapters(folder: Path) -> bool:
    """Whether a folder has an adapter: one of a set, that of a training, or those of one with several objectives."""
    if is_set(folder.parent) and (folder / WEIGHTS).is_file():
        return True
    return (folder / OBJECTIVE).is_file() or any(folder.glob(f"*/{OBJECTIVE}"))


@cache
def _published_bases() -> dict[str, str]:
    """The base models of packaged configurations, by their names without owners."""
    texts = (file.read_text(encoding="utf-8") for file in FOLDER.glob("*/*.yaml"))
    named = (re.search(r"^pretrained_model_name_or_path: *(\S+/(\S+))$", text, re.MULTILINE) for text in texts)
    return {match[2]: match[1] for match in named if match}
