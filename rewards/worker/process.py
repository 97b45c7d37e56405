"""The worker's own process: `python process.py SOCKET FUNCTION ARGUMENTS`, started by client.py.

It runs in the environment of the reward, where there is no stepfuse: the standard library and numpy alone. FUNCTION is
`path/to/file.py:name` or `module:name`; a class is made once, with ARGUMENTS as keywords.
"""

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import traceback
from types import ModuleType
from typing import Any

_LOADERS = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


def main() -> None:
    """Answer batches until the socket closes."""
    descriptor, function, arguments = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    _watch(descriptor)
    messages = _load_file(
        "stepfuse_worker_messages", os.path.join(os.path.dirname(os.path.abspath(__file__)), "messages.py")
    )
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    try:
        reward = _find(function)
        if isinstance(reward, type):
            reward = reward(**arguments)
        elif arguments:
            raise ValueError(f"arguments for {function}, which is a function; expected a class")
    except BaseException as error:
        traceback.print_exc()
        messages.send(connection, messages.encode({"kind": "broken", "message": _line(error)}))
        return
    messages.send(connection, messages.encode({"kind": "ready"}))
    while True:
        try:
            header, arrays = messages.receive(connection)
        except ConnectionError:
            return
        messages.send(connection, _answer(messages, reward, header, arrays))


def _answer(messages: ModuleType, reward: Any, header: "dict[str, Any]", arrays: "list[Any]") -> bytes:
    import numpy as np

    try:
        values = np.asarray(reward(arrays[0], header["prompts"]), dtype=np.float64)
        if values.shape != (len(arrays[0]),):
            raise ValueError(f"returned {values.shape} for {len(arrays[0])} images; expected ({len(arrays[0])},)")
    except Exception as error:
        traceback.print_exc()
        return messages.encode({"kind": "failed", "id": header["id"], "message": _line(error)})
    return messages.encode({"kind": "scores", "id": header["id"]}, [values])


def _watch(descriptor: int) -> None:
    """Fork a process that ends this one and all it started when the parent is gone, kill -9 or not.

    The parent's end of standard input closes then. A process, for a thread would wait for whatever holds the
    interpreter; and the parent is looked for too, since a process it forked may hold that end as well.
    """
    parent = os.getppid()
    if os.fork():
        return
    os.close(descriptor)
    with contextlib.suppress(OSError):
        while not (select.select([0], [], [], 1.0)[0] and not os.read(0, 1)):
            os.kill(parent, 0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _find(function: str) -> Any:
    place, _, name = function.rpartition(":")
    module = _load_reward(os.path.realpath(place)) if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        close = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], n=1)
        raise ValueError(f"{place} has no function {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return found


def _load_reward(file: str) -> ModuleType:
    """Run a file of the user as `python file.py` would, with the modules beside it before those that are installed.

    An installed module that has the file's own name is excepted: `hpsv2.py` may be a reward made with `hpsv2`.
    """
    folder, stem = os.path.dirname(file), os.path.splitext(os.path.basename(file))[0]
    installed = stem in sys.modules or "." in stem or importlib.util.find_spec(stem) is not None

    class Neighbours:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if path is not None or name == stem or name in sys.builtin_module_names:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, [folder])
            return spec if spec is not None and spec.origin is not None else None  # no folder without __init__.py

    sys.meta_path.insert(0, Neighbours)
    sys.path.append(folder)  # for processes that the reward starts, too
    return _load_file("stepfuse_worker_" + stem.replace(".", "_") if installed else stem, file)


def _load_file(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


def _line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    own = os.path.abspath(__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in (own, *_LOADERS)]
    return f"{text} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else text


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its names are not the environment's
    try:
        main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.killpg(os.getpgrp(), signal.SIGKILL)  # and with it all that the reward started
