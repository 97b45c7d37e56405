"""Lines on stderr that say what a program does while nothing else is shown, such as importing torch.

Programs show them, the command line and training. As a library, stepfuse prints nothing: the lines are records of the
logger `stepfuse.stages` at level INFO.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from stepfuse.data.garbage import without_collection

logger = logging.getLogger("stepfuse.stages")
T = TypeVar("T")


def stage(text: str) -> None:
    """Say what begins now and may take seconds."""
    logger.info(text)


def import_libraries() -> None:
    """In a program that shows its stages, import torch and diffusers, and say so before; elsewhere, do nothing."""
    if "diffusers" in sys.modules or not logger.handlers:
        return
    stage("Loading torch and diffusers …")
    with without_collection():
        import torch  # noqa: F401

        from stepfuse.data import library_messages  # noqa: F401  # diffusers, without its irrelevant messages


def counted(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, and while a program shows its stages on a terminal, a bar below them that counts the items."""
    if not (logger.handlers and sys.stderr.isatty()):
        return items

    from tqdm import tqdm

    return tqdm(items, desc=what, leave=False)


@contextmanager
def stages_shown(*, shown: bool = True) -> Iterator[None]:
    """Write the stages of a program to stderr.

    Args:
        shown: Whether this process writes them; of several processes that train together, one does.
    """
    if not shown:
        yield
        return
    handler, level, propagate = logging.StreamHandler(sys.stderr), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # else a handler of the root logger, which a library may add, would repeat them
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
