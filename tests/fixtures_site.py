"""The built site, and the links and anchors of its pages and of the repository's documents."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin

from tests.fixtures_documents import ROOT

GENERATED = [ROOT / "docs/reference" / f"{name}.md" for name in ("api", "commands", "settings", "rewards")]


@dataclass
class Page:
    """Addresses that a page leads to, and the anchors that it has."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.page.anchors.add(value or "")
            elif name in ("href", "src"):
                self.page.links.append(value or "")


def build_site(folder: Path) -> None:
    """Build the site as `scripts/docs` does, in the environment that is there."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "--quiet", ROOT / "docs", folder]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]


@cache
def read_html(file: Path) -> Page:
    """Links and anchors of HTML."""
    reader = _Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    return reader.page


@cache
def read_markdown(file: Path) -> Page:
    """Links of Markdown, and the anchors that a repository's page gives to its headings."""
    page = Page()
    parser = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)
    text = re.sub(r"\A---\n.*?\n---\n", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for token in parser.parse(text):
        if token.type == "heading_open":
            page.anchors.add(str(token.attrs["id"]))
        for child in token.children or ():
            page.links += [str(child.attrs[name]) for name in ("href", "src") if name in child.attrs]
        for part in (token, *(token.children or ())):
            if part.type in ("html_block", "html_inline"):
                html = _Reader()
                html.feed(part.content)
                page.links += html.page.links
                page.anchors |= html.page.anchors
    return page


def documents() -> list[Path]:
    """The Markdown that people read on the repository's pages."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "data").rglob("*.md"))]
