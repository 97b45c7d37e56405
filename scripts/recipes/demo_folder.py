"""The folder of a demo: which one is accepted, and which files in it are the demo's. Nothing here imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepfuse.data.folder_files import files_named
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.output_folder import delete_files, require_empty_dir
from stepfuse.data.run_lock import LOCK, check_free

STATE, RESULTS, PICTURES = "demo.json", "results.json", ("slider.png", "front.png")
ADAPTERS, SET = "adapters", "set"
FILES = (STATE, RESULTS, *PICTURES, f"{ADAPTERS}.yaml")
EARLIER = ("colourfulness", "compressibility")  # trainings of an earlier version
SETTINGS = ("objectives", "seed", "quick")  # of the command, as the state has them


def claim(output: Path, state: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Accept an empty folder, one where the same demo was begun, or with `overwrite` one without files in the way.

    Returns:
        Whether the demo was begun before.
    """
    if overwrite:
        require_empty_dir(
            output,
            overwrite=True,
            ours=demo_files,
            writes=(ADAPTERS, SET, *FILES),
            besides=(LOCK,),
            option="--output_dir",
        )
        delete_files(output, demo_files(output))
    known = read_state(output)
    if known is None:
        require_empty_dir(output, overwrite=overwrite, besides=(LOCK,), option="--output_dir")
        write_json(output / STATE, state)
        return False
    check_state(output, known, state)
    return True


def check_early(output: Path, state: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raise ValueError for a folder that `claim` will refuse, as far as that is known without torch."""
    known = None if overwrite else read_state(output)
    check_free(output, empty=not overwrite and known is None)
    if known is not None:
        check_state(output, known, state)


def check_state(output: Path, known: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError for a demo that was begun with other settings than those in `state`."""
    if any(known.get(name) != value for name, value in state.items()):
        begun = " ".join(f"--{name} {known.get(name)}" for name in ("objectives", "seed"))
        begun += " --quick" if known.get("quick") else ""
        same = all(known.get(name) == state[name] for name in SETTINGS)
        other = same or "objectives" not in known
        how = "of another version of stepfuse" if other else f"that was begun with {begun}"
        unwanted = " and leave out --quick" if state["quick"] and not known.get("quick") else ""
        remedy = "" if other else f"; pass {begun}{unwanted} to resume it"
        raise ValueError(
            f"--output_dir {output} holds a demo {how}{remedy}; --overwrite starts again, and other files stay"
        )


def read_state(output: Path) -> dict | None:
    """The settings of the demo that was begun in a folder; None where there is none."""
    try:
        return read_json(output / STATE, "the state of a demo")
    except ValueError:
        return None


def demo_files(folder: Path) -> set[Path]:
    """The files of the demo in a folder, which --overwrite replaces; none where no demo was begun."""
    from stepfuse.fuse.sets.create import set_files  # imports torch, as the next does
    from stepfuse.train.output import training_files

    if read_state(folder) is None:
        return set()
    files = files_named(folder, *FILES)
    files |= files_named(folder, *(f"{name}.yaml" for name in EARLIER))
    for name in (ADAPTERS, *EARLIER):
        files |= {Path(name, file) for file in (Path(LOCK), *training_files(folder / name))}
    return files | {Path(SET, file) for file in set_files(folder / SET)}
