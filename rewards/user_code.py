"""Functions and classes from Python files of the user, which are imported as `python path/to/file.py` runs them.

The folder of a file becomes a package below this module, `stepfuse.rewards.user_code.FOLDER`, where FOLDER is the
folder's path in base 32. Modules of the folder import each other by their plain names, as scripts of one folder do,
while they are loaded and later within functions. Other code does not see these names: a file `data.py` beside a reward
does not replace a module of a library, and two folders may each hold a `helper.py`. The package and its modules can be
imported by their full names in every process that has stepfuse, so objects they define can be pickled.
"""

import base64
import builtins
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from stepfuse.data.names import nearest
from stepfuse.data.text_files import file_name

PREFIX = f"{__name__}."  # of the names of packages and modules of users

__path__: list[str] = []  # makes this module a package
_loaded: dict[str, tuple[int, int]] = {}  # modification time and size of each module's file when it was loaded


def load_function(file: str, function: str) -> Callable[..., Any]:
    """Load a function, or another callable, from a Python file.

    The file is executed once per process, and again if it has changed.

    Raises:
        ValueError: If the file is missing, it raises an exception (the message names the line), or it has no such
            function (the message suggests a similar name).
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no Python file {file_name(file)!r}{': it is a folder' if path.is_dir() else ''}")
    module = _load(path.resolve())
    loaded = getattr(module, function, None)
    if not callable(loaded):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{file_name(file)} has no function or class {function!r}{nearest(function, names)}")
    return loaded


def _load(path: Path) -> ModuleType:
    folder = path.parent
    package = f"{PREFIX}{_encode(folder)}"
    name = f"{package}.{path.stem.replace('.', '_')}"
    status = path.stat()
    state = (status.st_mtime_ns, status.st_size)
    if name in sys.modules:
        if _loaded.get(name) == state:
            return sys.modules[name]
        _forget(package)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for importlib.import_module and pickles that name modules of the folder
    before = set(sys.modules)
    loader = _Loader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        importlib.import_module(package)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs, because dataclasses and pickle look it up
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        _forget(package, kept=before)
        text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        parts = [user_line(error), type(error).__name__, text]
        raise ValueError(f"{file_name(path)} cannot be imported: {': '.join(filter(None, parts))}") from error
    _loaded[name] = state
    return module


def _forget(package: str, kept: Collection[str] = ()) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{package}.") and name not in kept]:
        del sys.modules[name]


def user_line(error: BaseException) -> str:
    """Return the last line of a user's files in a traceback, as `file.py, line 3`, or an empty string."""
    if isinstance(error, SyntaxError) and error.lineno and Path(error.filename or "").is_file():
        return f"{file_name(Path(error.filename or '').name)}, line {error.lineno}"
    location = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).startswith(PREFIX):
            location = f"{file_name(Path(frame.f_code.co_filename).name)}, line {line}"
    return location


def _encode(folder: Path) -> str:
    return base64.b32encode(os.fsencode(folder)).decode().rstrip("=").lower()


def _decode(name: str) -> Path:
    text = name.upper()
    return Path(os.fsdecode(base64.b32decode(text + "=" * (-len(text) % 8))))


class _Loader(importlib.machinery.SourceFileLoader):
    """Execute a file of the user, whose imports search its folder first."""

    def get_code(self, fullname: str) -> Any:
        """Compile without a bytecode cache, which does not notice an edit within the same second."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        folder = module.__name__.removeprefix(PREFIX).partition(".")[0]
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _importer(folder)}
        super().exec_module(module)


def _importer(encoded: str) -> Callable[..., ModuleType]:
    """Return the function `__import__` for the modules of a folder."""
    package, folder = f"{PREFIX}{encoded}", _decode(encoded)

    # The signature of `__import__`.
    def import_module(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        top = name.partition(".")[0]
        if level or not _is_in_folder(top, folder):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        leaf = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
        return leaf if fromlist else sys.modules[f"{package}.{top}"]

    return import_module


def _is_in_folder(name: str, folder: Path) -> bool:
    """Whether `import name` in a script of this folder finds a module of the folder."""
    if name in sys.builtin_module_names:
        return False
    spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.origin is not None:
        return spec is not None
    try:  # a namespace package, which any other module of the same name precedes
        other = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        return False
    if other is None or other.origin is not None:
        return other is None
    return all(os.path.dirname(path) == str(folder) for path in other.submodule_search_locations or [])


class _Finder:
    """Find the packages of folders and their modules by their full names."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        folder, _, module = name.removeprefix(PREFIX).partition(".")
        if not module:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(_decode(folder))]
            return spec
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is not None and isinstance(found.loader, importlib.machinery.SourceFileLoader):
            found.loader = _Loader(name, found.loader.path)
        return found  # unchanged: missing, a namespace package, or an extension module


sys.meta_path.insert(0, _Finder)
