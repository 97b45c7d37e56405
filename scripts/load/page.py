"""How soon the page of a server shows a picture after a change, in Chromium on the same machine.

    python -m stepfuse.scripts.load.page emoji --output page.json

After a change of the prompt the first picture has few steps; after a change of the weights it is the nearest one that
was drawn before. The exact picture has all steps at the present weights. All times count from the change, the wait for
further keys included, and the page itself takes them (`performance.measure`), when a picture has been loaded. For
comparison the same image is asked for without the page, when nothing else is drawn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright

from stepfuse.data.json_file import write_json
from stepfuse.scripts.benchmark.server_process import ServerProcess, server_process
from stepfuse.scripts.evaluation.costs import machine
from stepfuse.scripts.load.browser import BROWSERS, find_browser
from stepfuse.scripts.load.wrong import PATH

REST = 3.0  # seconds between two changes, in which the lattice is being drawn
MILLISECONDS = 120_000  # that a picture may take
MEASURES = """() => Object.fromEntries(
    performance.getEntriesByType("measure").map(({ name, duration }) => [name, duration / 1000]))"""


def measure(model: str, *, changes: int, threads: int | None) -> dict[str, Any]:
    """Seconds of each change. A ValueError where there is no browser."""
    browser = find_browser()
    if browser is None:
        raise ValueError(f"no browser to open the page in; install one of {', '.join(BROWSERS)}")
    with server_process([model], threads=threads) as server, sync_playwright() as playwright:
        (served,) = json.loads(server.ask("GET", "/v1/sets")[1])["sets"]
        alone = one_run(server, served["prompts"][0], changes)
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(MILLISECONDS)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector(".view[data-kind=exact]")
        prompts = [f"{served['prompts'][k % len(served['prompts'])]} {k}" for k in range(changes)]
        shares = [10 + 80 * k // changes for k in range(changes)]
        return {
            "machine": machine(torch.device("cpu")),
            "settings": {"model": model, "changes": changes, "threads": threads, "browser": chromium.version},
            "one_run": alone,
            "prompt": [_after(page, partial(page.fill, "#prompt", text)) for text in prompts],
            "weights": [_after(page, partial(_set_share, page, share)) for share in shares],
        }


def one_run(server: ServerProcess, prompt: str, count: int) -> list[float]:
    """Seconds of the same image without the page, with all steps and when nothing else is drawn."""
    seconds = []
    for seed in range(1 + count):  # the first one warms up
        begin = time.perf_counter()
        status, body = server.ask("POST", PATH, {"prompt": prompt, "seed": seed})
        if status != 200:
            raise ValueError(f"the server answered with status {status}: {body.decode()[:300]}")
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def _set_share(page: Page, share: int) -> None:
    page.fill("#share-0", str(share))
    page.keyboard.press("Enter")


def _after(page: Page, change: Callable[[], None]) -> dict[str, float]:
    """Seconds from a change to the first picture and to the exact one."""
    time.sleep(REST)
    page.evaluate("() => performance.clearMeasures()")
    change()
    page.wait_for_function("() => performance.getEntriesByName('stepfuse exact picture').length > 0")
    found = page.evaluate(MEASURES)
    return {kind: found[f"stepfuse {kind} picture"] for kind in ("first", "exact")}


def page_table(results: dict[str, Any]) -> str:
    """Medians and maxima, as Markdown."""
    lines = ["| after a change of | picture | median, s | longest, s |", "|---|---|--:|--:|"]
    rows = [
        (what, kind, [each[kind] for each in results[what]])
        for what in ("prompt", "weights")
        for kind in ("first", "exact")
    ]
    rows.append(("(one run without the page)", "exact", results["one_run"]))
    lines += [f"| {what} | {kind} | {statistics.median(some):.2f} | {max(some):.2f} |" for what, kind, some in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="SET")
    parser.add_argument("--changes", type=int, default=8, help="of the prompt, and of the weights")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU, for the server")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the results")
    parsed = parser.parse_args(arguments)
    results = measure(parsed.model, changes=parsed.changes, threads=parsed.threads)
    if parsed.output is not None:
        write_json(parsed.output, results)
    print(page_table(results))


if __name__ == "__main__":
    main()
