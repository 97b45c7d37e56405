"""Docstrings are plain text, in which `names` are code; for reStructuredText, `*` and `|` of equations are escaped."""

import re
from typing import Any

from sphinx.application import Sphinx


def escape(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Escape in place what would be markup, outside code."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def escape_types(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Escape the named shapes of attributes, such as `batch *shape`, and leave out the modules of types."""
    for number, line in enumerate(lines):
        if line.startswith(":vartype "):
            lines[number] = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", line).replace("*", r"\*")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon, which adds markup
    app.connect("autodoc-process-docstring", escape_types, priority=600)  # after napoleon, which adds types
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
