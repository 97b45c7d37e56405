"""Which of the processes of a run prints and writes. Importing this does not import torch."""

import os


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several that a launcher started (`RANK` is 0)."""
    return os.environ.get("RANK", "0") == "0"
