"""Run methods in alternation, and what the results of all benchmarks share.

A ratio is of two times of the same round, so that other load on the machine falls on both.
"""

import importlib.metadata
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm

from stepfuse.data.markdown import markdown_table
from stepfuse.scripts.benchmark.checkout import NEEDS_CHECKOUT, has_baselines
from stepfuse.scripts.benchmark.memory import DoesNotFit, is_out_of_memory
from stepfuse.scripts.evaluation.costs import counted_rows, machine, now

Columns = list[tuple[str, Callable[[dict[str, Any]], str]]]  # of a table: the title, and an entry's cell
Row = TypeVar("Row")  # a row of the results: hashable, and its text is its name
LIBRARIES = ("torch", "diffusers", "peft", "transformers", "accelerate", "stepfuse")
LEFT_ALIGNED = ("algorithm", "load", "method", "range", "reward")  # columns of texts


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method that is ready to run."""

    run: Callable[[], Any]  # one measurement
    warm_up: Callable[[], Any] | None = None  # before the first measurement; by default `run`
    networks: Sequence[Any] = ()  # whose batches are counted in the warm-up
    close: Callable[[], None] = lambda: None  # releases what the method holds, such as processes


@dataclass(frozen=True, kw_only=True)
class Measured(Generic[Row]):
    """What was measured, by row."""

    seconds: dict[Row, list[float]] = field(default_factory=dict)  # of each round
    # Batch entries that went through the networks in the warm-up, and those of them whose output has a gradient.
    batch_rows: dict[Row, tuple[int, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # why a row could not be measured, by its text


def measure(
    builders: Mapping[Row, Callable[[], Method]],
    *,
    repeats: int,
    device: torch.device,
    required: Collection[Row] = (),
    hint: str = "",
    title: str = "time",
) -> Measured[Row]:
    """Build and warm up each method, then time all of them in alternation, `repeats` rounds.

    A method that runs out of memory is left out, with the reason in `skipped`.

    Raises:
        ValueError: where a `required` row does not fit in memory, with the `hint` what to do.
    """
    methods: dict[Row, Method] = {}
    measured: Measured[Row] = Measured()

    def warm_up(row: Row) -> None:
        method = methods[row] = builders[row]()
        with counted_rows(*method.networks) as counted:
            (method.warm_up or method.run)()
        measured.batch_rows[row] = counted["rows"], counted["with_gradient"]
        measured.seconds[row] = []

    def time(row: Row) -> None:
        begin = now(device)
        methods[row].run()
        measured.seconds[row].append(now(device) - begin)

    try:
        with tqdm(total=(repeats + 1) * len(builders), desc=title) as bar:
            for turn in (warm_up, *[time] * repeats):
                for row in builders:
                    bar.set_postfix_str(str(row))
                    if str(row) not in measured.skipped and (reason := _run_in_memory(turn, row)):
                        if row in required:
                            raise ValueError(f"{row} does not fit in memory; {hint}")
                        measured.skipped[str(row)] = reason
                        measured.seconds.pop(row, None)
                        if row in methods:
                            methods.pop(row).close()
                        clear_device_cache(garbage_collection=True)
                    bar.update()
    finally:
        for method in methods.values():
            method.close()
    return measured


def _run_in_memory(turn: Callable[[Row], None], row: Row) -> str:
    """Take a row's turn; the reason where it does not fit in memory, else nothing."""
    try:
        turn(row)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error) if isinstance(error, DoesNotFit) else "out of memory"
    return ""


def ratios(numerator: list[float] | None, denominator: list[float] | None) -> dict[str, float | None]:
    """Median and range over the rounds; None where one was not measured."""
    if numerator is None or denominator is None:
        return {"ratio": None, "ratio_min": None, "ratio_max": None}
    rounds = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"ratio": statistics.median(rounds), "ratio_min": min(rounds), "ratio_max": max(rounds)}


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with this number of CPU threads; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def context(device: torch.device) -> dict[str, Any]:
    return {"machine": machine(device), "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES}}


def available(rows: Sequence[Any], baselines: Collection[str]) -> tuple[list[Any], dict[str, str]]:
    """The rows that can be measured here, and why baselines cannot, by their names; one line on stderr says so too."""
    names = ", ".join(dict.fromkeys(row.method for row in rows if row.method in baselines))
    if not names or has_baselines():
        return list(rows), {}
    print(f"{names}: left out, {NEEDS_CHECKOUT}.", file=sys.stderr)
    return [row for row in rows if row.method not in baselines], {names: NEEDS_CHECKOUT}


def cell(key: str, form: str = "") -> Callable[[dict[str, Any]], str]:
    """A cell of a table: a value of a row's entry, or a dash in place of None."""
    return lambda entry: "–" if entry[key] is None else format(entry[key], form)


def ratio_range(entry: dict[str, Any]) -> str:
    return "–" if entry["ratio"] is None else f"{entry['ratio_min']:.2f}–{entry['ratio_max']:.2f}"


def results_table(columns: Columns, results: dict[str, Any]) -> str:
    """A line for each row of the results, one for each row that could not be measured, and one that states the depth of
    a network that has fewer layers than published, or could have.
    """
    titles = [title for title, _ in columns]
    rows = [[text(entry) for _, text in columns] for entry in results["rows"]]
    table = markdown_table(titles, rows, right=[title for title in titles if title not in LEFT_ALIGNED])
    skipped = [f"\n{row}: left out, {reason}." for row, reason in results.get("skipped", {}).items()]
    depth = [f"\n{results['depth']}."] if results.get("depth") else []
    return "\n".join([table, *skipped, *depth])
