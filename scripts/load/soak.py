"""Put a server under mixed load for some time, and check every answer.

    python -m stepfuse.scripts.load.soak emoji --minutes 30 --output soak.json

Requests of a pool are first sent alone, one after the other. Then several clients send them at random, in all ways that
clients have, leave in the middle, send nonsense and fill the queue. Every picture must be, byte for byte, the one drawn
alone; every request must be answered once, with its status, as the server itself counts; and memory, threads and open
files must not grow. At the end the server is told to stop while it draws. The exit status is 1 if anything is wrong.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from stepfuse.data.json_file import write_json
from stepfuse.scripts.benchmark.server_process import ServerProcess, server_process
from stepfuse.scripts.evaluation.costs import machine
from stepfuse.scripts.load.cases import SIZES, random_case
from stepfuse.scripts.load.client import Client, Solo, answer_alone
from stepfuse.scripts.load.stopping import stop_while_drawing
from stepfuse.scripts.load.tally import Tally, counted
from stepfuse.scripts.load.watch import Watch

TOKEN = "soak-of-a-server-on-this-machine"
FLAT = 0.02  # by which the memory may grow
SETTLED = 120.0  # seconds of load after which the memory is compared: what is allocated once is there by then
GRACE = 60.0


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What is run.

    Attributes:
        model: the set.
        pool: number of distinct requests.
        most_steps: of denoising.
        sizes: of images, of which one is chosen at random.
        every: seconds between two samples of the memory.
    """

    model: str
    minutes: float
    clients: int = 6
    pool: int = 150
    most_steps: int = 8
    sizes: tuple[str, ...] = SIZES
    max_queue: int = 24
    max_rows: int = 12
    seed: int = 0
    every: float = 5.0
    threads: int | None = None


def soak(settings: Soak) -> dict[str, Any]:
    """Run it; `faults` of the results has a line for each thing that is wrong."""
    options = ["--max_queue", str(settings.max_queue), "--max_rows", str(settings.max_rows), "--grace", str(GRACE)]
    with server_process([settings.model], options, threads=settings.threads, token=TOKEN) as server:
        tally = Tally()
        pool = draw_pool(server, settings, tally)
        watch = Watch(process=psutil.Process(server.process.pid), every=settings.every)
        idle = watch.sample()
        run_clients(server, pool, tally, watch, settings)
        await_idle(server, tally)
        for line in tally.compare(*settled(server, tally)):
            tally.fault(line)
        after = watch.sample()
        if 60 * settings.minutes >= SETTLED:
            for line in watch.grown(share=FLAT):
                tally.fault(line)
        if after.files > idle.files + 2:
            tally.fault(f"{idle.files} open files before the load, and {after.files} after it")
        drawn = [each for each in pool if each.status == 200]
        stopped = stop_while_drawing(server, drawn, tally, count=min(8, settings.max_queue), grace=GRACE)
        return {
            "machine": machine(torch.device("cpu")),
            "settings": vars(settings),
            "requests": {
                "distinct": len(pool),
                "drawn_alone": sum(each.status == 200 for each in pool),
                "answers": {str(status): count for status, count in sorted(tally.statuses.items())},
                "left": tally.left,
                "images": tally.images,
                "actions": dict(sorted(tally.actions.items())),
            },
            "memory": watch.summary(),
            "stopped": stopped,
            "faults": tally.faults,
        }


def draw_pool(server: ServerProcess, settings: Soak, tally: Tally) -> list[Solo]:
    """Distinct requests, with what is answered to each alone."""
    (served,) = json.loads(server.ask("GET", "/v1/sets")[1])["sets"]
    chosen = random.Random(settings.seed)
    pool = []
    for number in range(settings.pool):
        solo = answer_alone(server, random_case(chosen, served, most_steps=settings.most_steps, sizes=settings.sizes))
        tally.answered(solo.status, images=solo.images)
        pool.append(solo)
        if number % 10 == 9:
            print(f"{number + 1} of {settings.pool} requests computed alone", flush=True)
    refused = [each for each in pool if each.status != 200]
    if not len(refused) <= len(pool) / 3 or any(each.status != 400 for each in refused):
        tally.fault(f"alone, {len(refused)} of {len(pool)} requests were refused: {refused[0]}")
    return pool


def run_clients(server: ServerProcess, pool: Sequence[Solo], tally: Tally, watch: Watch, settings: Soak) -> None:
    """Clients and bursts until the time is over; then each ends what it has begun."""
    end = threading.Event()
    clients = [Client(server, pool, tally, seed=settings.seed + number) for number in range(1 + settings.clients)]
    for action in clients[0].actions:  # each once, whatever the random choices are
        clients[0].act(action)
    for name, wrong in clients[0].wrong.items():
        clients[0].send_wrong(name, wrong)
    threads = [threading.Thread(target=client.run, args=(end,)) for client in clients[1:]]
    threads += [
        threading.Thread(target=bursts, args=(server, pool, tally, settings, end)),
        threading.Thread(target=watch.run, args=(end,)),
    ]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    while time.monotonic() - begin < 60 * settings.minutes:
        time.sleep(min(10, max(0.1, begin + 60 * settings.minutes - time.monotonic())))
        sample = watch.sample()
        print(
            f"{sample.seconds:.0f} s: {sum(tally.statuses.values())} answers, {tally.left} left, "
            f"{tally.images} images, {len(tally.faults)} faults; "
            f"{sample.rss_mb:.0f} MB, {sample.threads} threads, {sample.files} files",
            flush=True,
        )
        if server.process.poll() is not None:
            tally.fault(f"the server ended with exit status {server.process.poll()}")
            break
    end.set()
    for thread in threads:
        thread.join()


def bursts(server: ServerProcess, pool: Sequence[Solo], tally: Tally, settings: Soak, end: threading.Event) -> None:
    """More requests at once than the queue has room for, now and then; those that are refused are sent again."""
    seconds = min(45.0, 20 * settings.minutes)
    while not end.wait(seconds):
        count = settings.max_queue + settings.max_rows + 4  # more than may wait and be drawn
        clients = [Client(server, pool, tally, seed=settings.seed + 1000 + number) for number in range(count)]
        threads = [threading.Thread(target=client.act, args=(client.ask_once,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def await_idle(server: ServerProcess, tally: Tally, *, seconds: float = 120) -> None:
    """Wait until nothing is drawn and nothing waits."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = json.loads(server.ask("GET", "/health")[1])
        if state["running"] == state["waiting"] == 0:
            return
        time.sleep(0.1)
    tally.fault(f"{state['running']} requests are running and {state['waiting']} wait, and nobody asks for any")


def settled(server: ServerProcess, tally: Tally) -> tuple[Any, int]:
    """What the server counts, once the last clients that left are among it."""
    until = time.monotonic() + 10
    while tally.compare(*(found := counted(server))) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def account(results: dict[str, Any]) -> str:
    """What was asked for and what came of it, in words."""
    requests, stopped = results["requests"], results["stopped"]
    answers = ", ".join(f"{count:,} with status {status}" for status, count in requests["answers"].items())
    lines = [
        f"Answers: {answers}; images in them: {requests['images']:,}; requests whose clients disconnected: "
        f"{requests['left']:,}; distinct requests: {requests['distinct']}; faults: {len(results['faults'])}."
    ]
    if means := results["memory"].get("second_and_last_fifth"):
        before, after = means["rss_mb"]
        lines.append(
            f"Memory: {before:.0f} MB on average in the second fifth of the time, {after:.0f} MB in the last "
            f"({100 * (after / before - 1):+.1f} %)."
        )
    later = ", ".join(f"{kind}: {count}" for kind, count in stopped["later_requests"].items())
    lines.append(
        f"After SIGTERM {stopped['drawn']} of the {stopped['sent']} accepted requests were completed, later ones "
        f"were refused ({later}), and the server ended after {stopped['seconds']:.1f} s with exit status "
        f"{stopped['exit_status']}."
    )
    return " ".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="SET")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=Soak.clients)
    parser.add_argument("--pool", type=int, default=Soak.pool, help="number of distinct requests")
    parser.add_argument("--most_steps", type=int, default=Soak.most_steps)
    parser.add_argument("--sizes", type=lambda text: tuple(text.split(",")), default=SIZES, metavar="64x64,48x48")
    parser.add_argument("--max_queue", type=int, default=Soak.max_queue, help="of the server")
    parser.add_argument("--max_rows", type=int, default=Soak.max_rows, help="of the server")
    parser.add_argument("--seed", type=int, default=Soak.seed)
    parser.add_argument("--threads", type=int, default=None, help="of the CPU, for the server")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the results")
    parsed = vars(parser.parse_args(arguments))
    output = parsed.pop("output")
    results = soak(Soak(**parsed))
    if output is not None:
        write_json(output, results)
    print(account(results))
    if results["faults"]:
        sys.exit("\n".join(f"fault: {line}" for line in results["faults"]))
    print("no faults")


if __name__ == "__main__":
    main()
