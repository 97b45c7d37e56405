"""Run a command, and end it with every process that it started when the process that started this one has ended.

`python supervisor.py COMMAND …`, with a pipe as standard input that is never written to: it closes when the process at
its other end ends, `kill -9` included. `accelerate launch` starts processes in sessions of their own, which no signal
to a process group reaches; so on Linux this process adopts every descendant that loses its parent, and ends them all.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
SECONDS = 2.0  # from SIGTERM to SIGKILL


def main() -> int:
    """The exit status of the command; 128 + N where signal N ended it, or this process."""
    parent = os.getppid()
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while command.poll() is None and not received and os.getppid() == parent:
        if select.select([0], [], [], 0.2)[0] and not os.read(0, 1):
            break
    status = command.poll()
    if status == 0:
        return 0
    end_descendants()
    if status is None:
        return 128 + (received[0] if received else signal.SIGTERM)
    return status if status > 0 else 128 - status


def end_descendants() -> None:
    """End all processes below this one: by SIGTERM, and those that are left after some seconds by SIGKILL."""
    deadline, terminated = time.monotonic() + SECONDS, set()
    while living := [child for child in psutil.Process().children(recursive=True) if _lives(child)]:
        late = time.monotonic() > deadline
        for child in living:
            if late or child.pid not in terminated:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGKILL if late else signal.SIGTERM)
                terminated.add(child.pid)
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


if __name__ == "__main__":
    sys.exit(main())
