"""Functions from Python files of the user, imported as `python path/to/file.py` would run them.

The folder of a file becomes a package of its own below this module, `stepfuse.rewards.user_code.FOLDER`, where FOLDER
is the folder's path in base 32. Its modules import one another by their plain names, as scripts of one folder do, when
they are loaded as well as later within functions. Nothing else in the process sees these names: a file `data.py` or
`datasets.py` beside a reward replaces no module of a library, and two folders may each hold a `helper.py`. The package
and its modules are importable by their full names in every process that has stepfuse, so what they define can be
pickled and sent to other processes.
"""

import base64
import builtins
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stepfuse.data.names import nearest
from stepfuse.data.text_files import file_name

__path__: list[str] = []  # a module with a path can have submodules

_loaded: dict[str, tuple[int, int]] = {}  # by module: time and size of its file when it was read


def load_function(file: str, function: str) -> Callable[..., Any]:
    """A function, or another callable, of a Python file.

    The file is run once in a process, and again only where it has changed since.

    Raises:
        ValueError: for a file that is not there or cannot be run, naming the line at fault, and for a function that it
            lacks, naming the nearest one.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no reward file {file_name(file)!r}{': it is a folder' if path.is_dir() else ''}")
    module = _load(path.resolve())
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{file_name(file)} has no function {function!r}{nearest(function, names)}")
    return found


def _load(path: Path) -> ModuleType:
    folder = path.parent
    package = f"{__name__}.{_encode(folder)}"
    name = f"{package}.{path.stem.replace('.', '_')}"
    status = path.stat()
    state = (status.st_mtime_ns, status.st_size)
    if name in sys.modules:
        if _loaded.get(name) == state:
            return sys.modules[name]
        for other in [other for other in sys.modules if other.startswith(f"{package}.")]:
            del sys.modules[other]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, for importlib.import_module and pickles that name modules of the folder
    before = set(sys.modules)
    try:
        importlib.import_module(package)
        module = importlib.util.module_from_spec(_spec(name, path))
        sys.modules[name] = module  # before it runs: dataclasses and pickles look there
        assert module.__spec__ is not None
        assert module.__spec__.loader is not None
        module.__spec__.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        for other in [other for other in sys.modules if other.startswith(f"{package}.") and other not in before]:
            del sys.modules[other]
        raise ValueError(f"{file_name(path)} cannot be run: {_describe(error, folder)}") from error
    _loaded[name] = state
    return module


def line_at_fault(error: BaseException) -> str:
    """The last line of the user's files that an error passed, as `file.py, line 3`; empty where it passed none."""
    frames = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    theirs = [(file, line) for name, file, line in frames if str(name).startswith(f"{__name__}.")]
    return f"{file_name(Path(theirs[-1][0]).name)}, line {theirs[-1][1]}" if theirs else ""


def _describe(error: BaseException, folder: Path) -> str:
    """An error on one line, with the last line of the user's files that it passed."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        text = f"{type(error).__name__}: {error.msg}"
        return f"{_place(error.filename, error.lineno, folder)}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if folder in Path(frame.filename).parents]
    return f"{_place(theirs[-1].filename, theirs[-1].lineno, folder)}: {text}" if theirs else text


def _place(file: str, line: int | None, folder: Path) -> str:
    path = Path(file)
    return f"{file_name(path.relative_to(folder) if folder in path.parents else path)}, line {line}"


def _encode(folder: Path) -> str:
    return base64.b32encode(os.fsencode(folder)).decode().rstrip("=").lower()


def _decode(name: str) -> Path:
    text = name.upper()
    return Path(os.fsdecode(base64.b32decode(text + "=" * (-len(text) % 8))))


def _spec(name: str, path: Path) -> importlib.machinery.ModuleSpec:
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    assert spec is not None
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a file of the user, whose imports look in its folder first."""

    def get_code(self, fullname: str) -> Any:
        """Compiled anew, without a cache: a file that was edited within a second is another."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        package = ".".join(module.__name__.split(".")[: __name__.count(".") + 2])
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": _importer(package)}
        super().exec_module(module)


def _importer(package: str) -> Callable[..., ModuleType]:
    """`__import__` for the modules of a folder."""
    folder = _decode(package.rpartition(".")[2])

    def import_module(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or not _is_neighbour(top, folder):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        leaf = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
        return leaf if fromlist else sys.modules[f"{package}.{top}"]

    return import_module


def _is_neighbour(name: str, folder: Path) -> bool:
    """Whether `import name` in a script of this folder finds a module of the folder."""
    if name in sys.builtin_module_names:
        return False
    spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if spec is None:
        return False
    if spec.origin is None:  # a folder without __init__.py, which any other module of its name precedes
        return all(str(folder) == os.path.dirname(place) for place in _found_elsewhere(name))
    return True


def _found_elsewhere(name: str) -> list[str]:
    """Where the folder of a namespace package lies, or the file of another module."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a specification, such as __main__
        return [name]
    if spec is None:
        return []
    return list(spec.submodule_search_locations or []) if spec.origin is None else [str(spec.origin)]


class _Finder:
    """Finds the packages of folders and their modules by their full names."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        if name.count(".") == __name__.count(".") + 1:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(_decode(name.rpartition(".")[2]))]
            return spec
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None or not isinstance(found.loader, importlib.machinery.SourceFileLoader):
            return found  # none, a namespace package, or an extension module
        assert found.origin is not None
        spec = _spec(name, Path(found.origin))
        spec.submodule_search_locations = found.submodule_search_locations
        return spec


sys.meta_path.insert(0, _Finder)
