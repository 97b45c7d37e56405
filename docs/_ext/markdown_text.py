"""Plain text of docstrings and help pages as Markdown, and paragraphs and blocks of it."""

import re

# Code, flags, and papers; all else is escaped.
_MARKS = re.compile(r"(?P<code>`[^`]+`)|(?P<flag>(?<![\w-])--[a-z]\w*)|arXiv:(?P<paper>\d{4}\.\d{5})")


def as_markdown(text: str) -> str:
    """One line of Markdown that reads as the text: flags become code, papers links, and nothing else is markup."""
    parts, end = [], 0
    text = " ".join(text.split())
    for mark in _MARKS.finditer(text):
        parts += [_escape(text[end : mark.start()]), _markup(mark)]
        end = mark.end()
    return "".join([*parts, _escape(text[end:])])


def _markup(mark: re.Match[str]) -> str:
    if mark["paper"]:
        return f"[arXiv:{mark['paper']}](https://arxiv.org/abs/{mark['paper']})"
    return mark["code"] or f"`{mark['flag']}`"


def _escape(text: str) -> str:
    return re.sub(r"([\\*_{}\[\]<>#|$~^&])", r"\\\1", text)


def directive(name: str, argument: str, body: str = "") -> str:
    """A block of MyST's, such as an option with its help."""
    lines = [f"```{{{name}}} {argument}", *(["", body] if body else []), "```"]
    return "\n".join(lines)


def code(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"
