"""Tests and measurements for a machine with a GPU, in parts that end independently.

What a part finds is written to the output file as the part ends. Parts that have passed are not run again on the same
commit and machine, so that the same command goes on where the time was over. Those that failed come after those that
have not been run.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepfuse.data.json_file import read_json, write_json
from stepfuse.scripts.gpu.parts import LETTERS, all_parts, chosen
from stepfuse.scripts.gpu.process import Starter
from stepfuse.scripts.gpu.summary import summary

STARTED = 120.0  # seconds in which the libraries are imported and the GPU is found, at most
LEAST = 10.0  # a part is not started with less time left, in seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where all parts that were asked for have passed."""
    given = _parser().parse_args(arguments)
    begin = time.monotonic()
    if given.pretend:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads are slower on models as small as these
    parts = all_parts(pretend=given.pretend)
    names = chosen(given.parts, parts) if given.parts else list(parts)
    limits = {name: part.limit for name, part in parts.items()}
    for beginning, seconds in given.limit:
        limits |= dict.fromkeys(chosen([beginning], parts), seconds)
    output = given.output or Path("outputs", "gpu_check-pretended.json" if given.pretend else "gpu_check.json")
    results: dict[str, Any] = {"format_version": 1, "parts": {}}
    if output.exists():
        results = read_json(output, "the results of scripts/gpu_check")
        if not isinstance(results.get("parts"), dict):
            raise ValueError(f"--output {output} holds no results of scripts/gpu_check; choose another --output")
    known = results["parts"]
    if given.again:
        for name in names:
            known.pop(name, None)
    pending = [name for name in names if known.get(name, {}).get("status") != "passed"]
    pending.sort(key=lambda name: name in known)
    if kept := len(names) - len(pending):
        print(f"{kept} of {len(names)} parts have passed before, and are not run again without --again", flush=True)
    if pending:
        starter = _starter(results, output, pretend=given.pretend)
    for index, name in enumerate(pending, 1):
        left = given.time_limit - (time.monotonic() - begin)
        if left < LEAST:
            print(f"{len(pending) - index + 1} parts are left for the next run: the time is over")
            break
        part = parts[name]
        known[name] = starter.run(part.function, part.values, min(left, limits[name]))
        write_json(output, results)
        left = given.time_limit - (time.monotonic() - begin)
        print(f"[{index}/{len(pending)}] {name}: {_line(known[name])}; {max(0.0, left):.0f} s left", flush=True)
    print(f"\n{summary(results)}\n\n{output}")
    return int(any(known.get(name, {}).get("status") != "passed" for name in names))


def _line(entry: dict[str, Any]) -> str:
    reason = f", {entry['reason']}" if "reason" in entry else ""
    return f"{entry['status']} in {entry['seconds']:.1f} s{reason}"


def _starter(results: dict[str, Any], output: Path, *, pretend: bool) -> Starter:
    """How processes are started here; the GPU and the libraries go into the results.

    Raises:
        ValueError: where there is no GPU, and for results of another commit, machine or library.
    """
    found: dict[str, Any] = {}
    for method in ("forkserver", "spawn"):
        starter = Starter(method=method, pretend=pretend)
        found = starter.run("describe", {}, STARTED)
        if found["status"] == "passed":
            break
    else:
        raise ValueError(f"the GPU cannot be used: {found['reason']}")
    context = {**found["result"], "pretended": pretend, "commit": _commit()}
    if not found["result"]:
        raise ValueError("no CUDA device; run this where there is one, or try its parts on a pretended one: --pretend")
    for key in context.keys() & results.keys():
        if results[key] != context[key]:
            raise ValueError(
                f"--output {output} has results of {key} {results[key]!r}, and now it is {context[key]!r}; choose "
                "another --output"
            )
    parts = results.pop("parts")
    results |= context | {"parts": parts}
    return starter


def _commit() -> str:
    """The state of the checkout: its commit, and whether files are changed; empty where git or its data is absent."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    letters = "; ".join(f"{letter}: {what}" for letter, what in LETTERS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        metavar="b,a",
        help="parts to run, by their names or beginnings such as b-sdxl, which are run in this order "
        f"({letters}; default: all)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file of the results (default: outputs/gpu_check.json)"
    )
    parser.add_argument(
        "--time_limit",
        type=float,
        default=460.0,
        metavar="SECONDS",
        help="time of all parts, after which what still runs is killed, to be run again (default: %(default)g)",
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        action="append",
        default=[],
        metavar="PART=SECONDS",
        help="a limit for some parts in place of their own; may be given several times",
    )
    parser.add_argument("--again", action="store_true", help="also run the parts that have passed")
    parser.add_argument(
        "--pretend", action="store_true", help="small models on a simulated CUDA device: a test of this script"
    )
    return parser


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    return name, float(seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the part that runs
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that asking for a GPU does not use it before processes fork
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
