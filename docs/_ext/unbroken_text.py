"""Text of the site that is not divided between two lines: intervals and ranges in tables, options in commands.

Browsers may break a line after a hyphen, a dash or a space, as in `--` `output` or `[+0.65,` `+0.72]`.
"""

import re
from typing import Any

from sphinx.application import Sphinx

CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
CODE = re.compile(r'<div class="highlight-(?:bash|text)\b.*?</pre>|<code class="docutils literal.*?</code>', re.DOTALL)
INTERVAL = re.compile(r"\[[^\[\]]*\d[^\[\]]*\]|\d[\d.,]*–\d[\d.,]*|[−\d][\d.]* ± [\d.]+")
OPTION = re.compile(r"(?<![\w-])(?:--|&#45;&#45;)[a-z][\w-]*")  # Sphinx writes the dashes of inline code as entities


def unbroken(html: str, parts: re.Pattern[str]) -> str:
    """Mark these parts of the text, not of the tags, for `site.css`."""
    pieces = re.split(r"(<[^>]*>)", html)
    pieces[::2] = [parts.sub(r'<span class="unbroken">\g<0></span>', text) for text in pieces[::2]]
    return "".join(pieces)


def mark(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Mark such text of a page before it is written."""
    if "body" in context:
        body = CELL.sub(lambda cell: unbroken(cell[0], INTERVAL), context["body"])
        context["body"] = CODE.sub(lambda block: unbroken(block[0], OPTION), body)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", mark)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
