"""Memory of methods: measured in child processes, and checked before a network is copied."""

import math
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

from stepfuse.scripts.evaluation.costs import free_memory, peak_memory

Report = Callable[[dict[str, Any]], None]


class DoesNotFit(MemoryError):
    """A method needs more memory than is free."""


def add_memory(
    results: dict[str, Any],
    entries: Mapping[Any, dict[str, Any]],
    memory_of: Callable[[Any, Any], dict[str, Any]],
    settings: Any,
    report: Report,
) -> None:
    """Measure the memory of each row in a new process, and add it to the row's entry, which else keeps its None.

    `memory_of` must be importable by its name, since the process calls it.
    """
    for row, entry in tqdm(entries.items(), desc="memory"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                entry.update(process.submit(memory_of, settings, row).result())
            except (MemoryError, RuntimeError) as error:
                # A broken pool: the system has ended the process.
                if not isinstance(error, BrokenProcessPool) and not is_out_of_memory(error):
                    raise
        report(results)


def peak_megabytes(run: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory in use during a call, in MB; None where the system cannot tell."""
    with peak_memory(device) as peak:
        run()
        found = peak()
    return None if math.isnan(found) else found


def check_copies(network: Any, copies: int, device: torch.device) -> None:
    """Raise `DoesNotFit` if copies of a network take four fifths of the free memory or more."""
    size, free = copies * network.get_memory_footprint(), free_memory(device)
    if size >= 0.8 * free:
        raise DoesNotFit(f"copies of the network take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of memory: a GPU's, or the CPU's, for which torch has no class of error."""
    texts = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)
