"""The training programs: settings, errors in one line, exit status. Importing this module does not import torch."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from stepfuse.data.checkpoint_folders import list_checkpoints
from stepfuse.data.garbage import end_without_collection
from stepfuse.data.main_process import is_main_process
from stepfuse.data.run_lock import check_free
from stepfuse.data.stages import import_libraries, stages_shown
from stepfuse.data.text_files import print_any_text, printable, write_text
from stepfuse.rewards.reward_name import check_reward
from stepfuse.train.arguments import parse_values
from stepfuse.train.settings import TrainSettings


def run_training(settings_type: type[TrainSettings], train: Callable[[Any], object] | None = None) -> None:
    """Parse the command line and train; end with one line and a non-zero exit status if that fails.

    Args:
        train: trains with these settings; by default `train_adapter`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # on import it warns of torchvision, which is not needed
    end_without_collection()
    print_any_text()
    output: str | None = None
    try:
        values = parse_values(settings_type, sys.argv[1:])
        if train is None:  # distillation computes no rewards
            check_rewards(values)
        output = str(values["output_dir"])
        _check_free(Path(output), new=not values["overwrite"] and values["resume_from_checkpoint"] is None)
        with stages_shown(shown=is_main_process()):
            settings = settings_type(**values)
            import_libraries()

            from stepfuse.fuse.backbones.loading import quiet_libraries
            from stepfuse.train.loop import train_adapter

            quiet_libraries()
            (train or train_adapter)(settings)
    except ValueError as error:
        _fail(f"error: {printable(error)}")
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\n{_interrupted(output)}", file=sys.stderr, flush=True)
        sys.exit(130)


def _check_free(output: Path, *, new: bool) -> None:
    """Refuse a folder that is in use, and for a new run one that is not empty, with how to continue a run in it."""
    try:
        check_free(output, empty=new)
    except ValueError as error:
        if new and list_checkpoints(output):
            raise ValueError(f"{error}; to continue its run, pass --resume_from_checkpoint latest") from error
        raise


def check_rewards(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a reward that is not known or whose file does not exist, before torch is imported."""
    entries = values.get("objectives") or [values]
    for entry in entries:
        name = entry.get("reward") if isinstance(entry, Mapping) else None
        if isinstance(name, str) and not values.get("pairs"):
            check_reward(name)


def _fail(line: str) -> NoReturn:
    """Exit with a line on stderr; if torchrun launched this process, it also prints the line in its summary."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}  # shown as the traceback
        write_text(Path(file), json.dumps({"message": {"message": line, "extraInfo": details}}))
    sys.exit(line)


def _interrupted(output: str | None) -> str:
    """How to resume after Ctrl-C."""
    if output is None or "stepfuse.train.checkpoints" not in sys.modules:
        return "interrupted before training began; nothing was written"
    checkpoints = list_checkpoints(Path(output))
    if not checkpoints:
        begun = (Path(output) / "config.yaml").is_file()
        return f"interrupted before the first checkpoint in {output}; start again{' with --overwrite' * begun}"
    return f"interrupted; resume from {checkpoints[-1]} with the same command and --resume_from_checkpoint latest"
