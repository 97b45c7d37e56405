"""The training programs: settings, errors in one line, exit status. Importing this module does not import torch."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from stepfuse.data.text_files import print_any_text, printable, write_text
from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import TrainSettings


def run_training(settings_type: type[TrainSettings], train: Callable[[Any], object] | None = None) -> None:
    """Parse the command line and train; end with one line and a non-zero exit status if that fails.

    Args:
        train: trains with these settings; by default `train_adapter`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # on import it warns of torchvision, which is not needed
    print_any_text()
    output: str | None = None
    try:
        settings = parse_settings(settings_type, sys.argv[1:])
        output = settings.output_dir
        from stepfuse.fuse.backbones.loading import quiet_libraries
        from stepfuse.train.loop import train_adapter

        quiet_libraries()
        (train or train_adapter)(settings)
    except ValueError as error:
        _fail(f"error: {printable(error)}")
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{_interrupted(output)}", file=sys.stderr, flush=True)
        sys.exit(130)


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
    from stepfuse.train.checkpoints import list_checkpoints

    checkpoints = list_checkpoints(Path(output))
    if not checkpoints:
        return f"interrupted before the first checkpoint in {output}; start again with --overwrite"
    return f"interrupted; resume from {checkpoints[-1]} with the same command and --resume_from_checkpoint latest"
