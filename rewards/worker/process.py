"""The program of a worker process: `python process.py SOCKET FUNCTION ARGUMENTS`, started by client.py.

It runs in the environment of the reward, where stepfuse is not installed, so it imports only the standard library and
numpy. FUNCTION is `path/to/file.py:name` or `module:name`. A class is instantiated once, with the JSON object ARGUMENTS
as keyword arguments.
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
    """Load the reward and score batches until the socket is closed."""
    descriptor, function, arguments = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    _fork_watchdog(descriptor)
    folder = os.path.dirname(os.path.abspath(__file__))
    messages = _load_file("stepfuse_worker_messages", os.path.join(folder, "messages.py"))
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    try:
        reward = _load_function(function)
        if isinstance(reward, type):
            reward = reward(**arguments)
        elif arguments:
            raise ValueError(f"{function} is a function, and arguments are given; expected a class")
    except BaseException as error:
        traceback.print_exc()
        messages.send(connection, messages.encode({"kind": "broken", "message": _describe(error)}))
        return
    messages.send(connection, messages.encode({"kind": "ready"}))
    while True:
        try:
            header, arrays = messages.receive(connection)
        except ConnectionError:
            return
        messages.send(connection, messages.encode(*_score(reward, header, arrays)))


def _score(reward: Any, header: "dict[str, Any]", arrays: "list[Any]") -> "tuple[dict[str, Any], list[Any]]":
    import numpy as np

    try:
        values = np.asarray(reward(arrays[0], header["prompts"]), dtype=np.float64)
        if values.shape != (len(arrays[0]),):
            raise ValueError(f"returned {values.shape} for {len(arrays[0])} images; expected ({len(arrays[0])},)")
    except Exception as error:
        traceback.print_exc()
        kind = "out of memory" if _is_out_of_memory(error) else "failed"
        return {"kind": kind, "id": header["id"], "message": _describe(error)}, []
    return {"kind": "scores", "id": header["id"]}, [values]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in an environment that may have another torch or none."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return "MemoryError" in names or "OutOfMemoryError" in names or "can't allocate memory" in str(error)


def _fork_watchdog(descriptor: int) -> None:
    """Fork a process that kills this process group when the parent has ended, even by SIGKILL.

    It detects the end of the parent by the end of standard input, and checks every second whether the parent exists,
    because a fork of the parent may keep standard input open. A thread would wait for code that holds the interpreter's
    lock.
    """
    parent = os.getppid()
    if os.fork():
        return
    os.close(descriptor)
    with contextlib.suppress(OSError):
        while not (select.select([0], [], [], 1.0)[0] and not os.read(0, 1)):
            os.kill(parent, 0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _load_function(function: str) -> Any:
    source, _, name = function.rpartition(":")
    module = _load_user_file(os.path.realpath(source)) if source.endswith(".py") else importlib.import_module(source)
    loaded = getattr(module, name, None)
    if not callable(loaded):
        close = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], n=1)
        raise ValueError(f"{source} has no function {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return loaded


def _load_user_file(file: str) -> ModuleType:
    """Run a file of the user as `python file.py` would, where modules of its folder precede installed modules.

    An installed module that has the name of the file can still be imported: `hpsv2.py` may import the package `hpsv2`.
    """
    folder, stem = os.path.dirname(file), os.path.splitext(os.path.basename(file))[0]
    installed = stem in sys.modules or "." in stem or importlib.util.find_spec(stem) is not None

    class FolderFinder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if path is not None or name == stem or name in sys.builtin_module_names:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, [folder])
            return spec if spec is not None and spec.origin is not None else None  # no namespace packages

    sys.meta_path.insert(0, FolderFinder)
    sys.path.append(folder)  # also for processes that the reward starts
    return _load_file("stepfuse_worker_" + stem.replace(".", "_") if installed else stem, file)


def _load_file(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, because dataclasses and pickle look it up
    spec.loader.exec_module(module)
    return module


def _describe(error: BaseException) -> str:
    """The error on one line, with the last line of the reward's code that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    internal = (os.path.abspath(__file__), *_LOADERS)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in internal]
    return f"{text} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else text


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose modules must not hide those of the environment
    try:
        main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.killpg(os.getpgrp(), signal.SIGKILL)  # includes the processes that the reward started
