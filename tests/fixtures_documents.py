"""Fenced code of the documents, and the commands in it."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in sorted((ROOT / "docs").rglob("*.md"))),
    *("README.md", "CONTRIBUTING.md"),
]


def blocks(document: str, language: str) -> list[str]:
    """Fenced code of one language."""
    return [code for written, code in code_blocks(document) if written == language]


def code_blocks(document: str) -> list[tuple[str, str]]:
    """Language and code of every fenced block, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```([^\n`]*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(code: str) -> list[str]:
    """The commands of a block of bash; one that has a line's end in quotes goes on in the next line."""
    found, begun = [], ""
    for line in code.replace("\\\n", " ").splitlines():
        begun += line
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # no closing quotation
            begun += "\n"
            continue
        if words:
            found.append(begun.strip())
        begun = ""
    assert not begun, f"no end of {begun!r}"
    return found
