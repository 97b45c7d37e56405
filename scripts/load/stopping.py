"""A server that is told to stop while it draws."""

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stepfuse.scripts.benchmark.server_process import ServerProcess
from stepfuse.scripts.load.client import Solo, answer_alone
from stepfuse.scripts.load.tally import Tally
from stepfuse.scripts.load.wrong import PATH


def stop_while_drawing(
    server: ServerProcess, pool: Sequence[Solo], tally: Tally, *, count: int, grace: float
) -> dict[str, Any]:
    """Send SIGTERM while requests are drawn and wait: they end with their pictures, and later ones are refused.

    Args:
        pool: of which the longest are sent.
        count: of these, as many as may wait.
        grace: seconds that the server gives them.
    """
    longest = sorted(pool, key=lambda each: -each.case["steps"] * each.images)[:count]
    answers: dict[int, Solo] = {}
    faults: list[str] = []

    def ask(index: int) -> None:
        try:
            answers[index] = answer_alone(server, longest[index].case)
        except OSError as error:
            faults.append(f"a request that was accepted before SIGTERM ended with {type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(longest))]
    for thread in threads:
        thread.start()
    state = {"running": 0, "waiting": 0}
    until = time.monotonic() + 30
    while sum(state.values()) + len(answers) < len(longest) and time.monotonic() < until:
        found = json.loads(server.ask("GET", "/health")[1])
        state = {name: found[name] for name in state}
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    late: Counter[str] = Counter()
    ended: int | None = None
    while server.process.poll() is None and time.monotonic() - begin < 2:
        try:
            status, _ = server.ask("POST", PATH, longest[0].case)
            late[str(status)] += 1
        except OSError:
            late["no connection"] += 1
        time.sleep(0.05)
    try:
        ended = server.process.wait(grace + 30)
    except subprocess.TimeoutExpired:
        server.process.kill()
    seconds = time.monotonic() - begin
    for thread in threads:
        thread.join()
    faults += [
        f"status {each.status} after SIGTERM, or other pictures than alone: {longest[index].case}"
        for index, each in answers.items()
        if each != longest[index]
    ]
    faults += [
        f"after SIGTERM, a new request was answered with {kind}"
        for kind in late
        if kind not in ("503", "no connection")
    ]
    if ended != 0:
        faults.append(f"after SIGTERM, the exit status is {ended}; expected 0 within {grace} s")
    for line in faults:
        tally.fault(line)
    return {
        "sent": len(longest),
        "at_sigterm": state,
        "drawn": sum(each.status == 200 for each in answers.values()),
        "later_requests": dict(late),
        "seconds": round(seconds, 2),
        "exit_status": ended,
    }
