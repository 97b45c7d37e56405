"""A process for each part, which ends with its limit and cannot take the others with it. Nothing here imports torch.

The processes are forked from a server that has imported the libraries and has not used the GPU, so that none waits for
the imports. Where a library uses the GPU as it is imported, they are started afresh instead.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from stepfuse.data.json_file import write_json

WORK = "stepfuse.scripts.gpu.work"
LOG_LINES = 15  # of what a failed part has printed
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part runs.

    Attributes:
        folder: for its files, which are deleted after it.
        pretend: on the pretended device.
        start: how it may start processes of its own, `fork` or `spawn`.
    """

    folder: Path
    pretend: bool
    start: str


@dataclass(frozen=True, kw_only=True)
class Starter:
    """How processes are started: `forkserver` or `spawn`."""

    method: str
    pretend: bool

    def run(self, function: str, values: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """What became of a function of `work`: its status, seconds, result, and why it failed."""
        context: Any = multiprocessing.get_context(self.method)
        if self.method == "forkserver":
            context.set_forkserver_preload([WORK])
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            place = Place(
                folder=Path(folder), pretend=self.pretend, start="fork" if self.method == "forkserver" else "spawn"
            )
            process = context.Process(target=_in_process, args=(place, function, dict(values)))
            process.start()
            try:
                process.join(limit)
                over = process.is_alive()
            finally:
                _kill(process)
            found = _found(place.folder)
            entry = {"seconds": round(time.perf_counter() - begin, 1), "result": found.get("result")}
            if over:
                return {"status": "over its limit", "reason": f"killed after {limit:.3g} s", **entry}
            if found.get("done"):
                return {"status": "passed", **entry}
            reason = found.get("reason") or f"its process ended with exit code {process.exitcode}"
            return {"status": "failed", "reason": reason, **entry, "log": _last_lines(place.folder / "log")}


def _in_process(place: Place, function: str, values: dict[str, Any]) -> None:
    os.setsid()  # a group of its own, to be killed as a whole
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    log = os.open(place.folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    file = place.folder / "found.json"
    found: dict[str, Any] = {}

    def report(result: dict[str, Any]) -> None:
        found["result"] = result
        write_json(file, found)

    try:
        work = importlib.import_module(WORK)
        work.prepare(place)
        result = getattr(work, function)(place, report, **values)
        write_json(file, {"result": result, "done": True})
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        write_json(file, found | {"reason": f"{type(error).__name__}: {lines[0]}"})
        sys.stderr.flush()
        sys.exit(1)


def _end_with(parent: Any) -> None:
    """Kill this group when the process that enforces its limit is gone."""
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _kill(process: BaseProcess) -> None:
    """The process, and those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        if process.pid is not None and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _found(folder: Path) -> dict[str, Any]:
    file = folder / "found.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _last_lines(file: Path) -> list[str]:
    """Of a log, with progress bars as they were last."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return [line.rpartition("\r")[2][:300] for line in text.replace("\r\n", "\n").split("\n")[-LOG_LINES:] if line]
