"""The public interface of stepfuse: names that README, cards and documentation use.

`__init__.pyi` lists them, for type checkers and for this module, which imports a name when it is first used: so
`import stepfuse` takes no time and no memory.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

# Name → module, of lines such as `from stepfuse.rewards.protocol import Reward as Reward`.
_IMPORT = re.compile(r"^from (?P<module>\S+) import (?P<name>\w+) as (?P=name)$", re.MULTILINE)
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULES = {found["name"]: found["module"] for found in _IMPORT.finditer(_STUB)}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes more time than the rest of `stepfuse --help`

        value: Any = version("stepfuse")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'stepfuse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
