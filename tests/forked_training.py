"""A program that runs `main()` of train/ in forked children, so that twenty runs cost one start of Python.

Started by `accelerate launch`, whose environment every child has. A line of JSON on its input, [algorithm, arguments],
is answered with the child's process id, and when that child has ended with its exit status, or minus a signal.
"""

import json
import os
import sys

from stepfuse.fuse.sampling import sampler  # noqa: F401  imported here once, for all children
from stepfuse.train import algorithms, ddpo, distill, distill_run, dpo, loop, offline  # noqa: F401

MAIN = {"dpo": dpo.main, "ddpo": ddpo.main, "distill": distill.main}


def run(algorithm: str, arguments: list[str]) -> None:
    """Never returns: this is the child."""
    log = os.open("child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [f"train/{algorithm}.py", *arguments]
    status = 0
    try:
        MAIN[algorithm]()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        status = 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 2
    finally:
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    print(child, flush=True)
    _, ended = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(ended), flush=True)
