"""A program that runs `main()` of train/ in forked children, so that twenty runs cost one start of Python.

Started by `accelerate launch`, whose environment every child has; each process that it starts connects to the socket
that is its argument. A line of JSON from there, [algorithm, arguments, further environment], is answered with the
child's process id, and when that child has ended with its exit status, or minus a signal.
"""

import json
import os
import socket
import sys

import tensorboard  # noqa: F401  imported here once, for all children, with what they import as they need it
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline  # noqa: F401

from stepfuse.fuse.sampling import sampler  # noqa: F401
from stepfuse.train import algorithms, ddpo, distill, distill_run, dpo, loop, offline  # noqa: F401

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed  # noqa: F401

MAIN = {"dpo": dpo.main, "ddpo": ddpo.main, "distill": distill.main}


def run(algorithm: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Never returns: this is the child."""
    log = os.open("child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
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


with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    stream = connection.makefile("rw", encoding="utf-8")
    print(os.environ.get("RANK", "0"), file=stream, flush=True)
    for line in stream:
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        print(child, file=stream, flush=True)
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), file=stream, flush=True)
