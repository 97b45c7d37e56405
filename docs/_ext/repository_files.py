"""Links of pages to files of the repository outside docs/, which work on the repository's pages and in the site.

A link to a file that the site shows as a page, by `repository_pages` of conf.py, leads to that page; one to any other
file leads to a copy of it in the site; one to a folder becomes text. `[a fox](#missing)` stays for MyST to report.
"""

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

COPIES = "files"  # folder of the site


def show_file(app: Sphinx, docname: str, source: list[str]) -> None:
    """Show a file of the repository in place of the page that stands for it."""
    for name, page in app.config.repository_pages.items():
        if page == docname and page != app.config.root_doc:
            file = Path(app.srcdir).parent / name
            app.env.note_dependency(file)
            source[0] = file.read_text(encoding="utf-8")


class RepositoryLinks(SphinxTransform):
    """Resolve the links and pictures of a page whose target is a file of the repository."""

    default_priority = 50  # before Sphinx collects downloads and pictures

    def apply(self, **_: Any) -> None:
        self.docs = Path(self.env.srcdir).resolve()
        self.repository = self.docs.parent
        pages = self.config.repository_pages
        shown = {page: name for name, page in pages.items() if page != self.config.root_doc}
        self.pages = {self.repository / name: page for name, page in pages.items()}
        self.page = self.docs / f"{self.env.docname}.md"  # where the links of the text below start
        self.source = self.repository / shown[self.env.docname] if self.env.docname in shown else self.page
        for image in list(self.document.findall(nodes.image)):
            file = self.source.parent / image["uri"]
            if self.source is not self.page and file.is_file():
                image["uri"] = os.path.relpath(file, self.page.parent)
        for link in list(
            self.document.findall(lambda node: node.get("reftype") == "myst" if _is_link(node) else False)
        ):
            self.resolve(link)

    def resolve(self, link: Any) -> None:
        """Replace a link of MyST's, unless it leads to a page of docs/ or nowhere."""
        name, _, fragment = link["reftarget"].partition("#")
        if link.get("refdomain") == "doc":
            if name in self.env.found_docs:
                return
            target, fragment = self.docs / f"{name}.md", link["reftargetid"]
        else:
            target = self.source.parent / name
        target = Path(os.path.normpath(target))
        if not name or not target.is_relative_to(self.repository) or not target.exists():
            return
        page = self.pages.get(target) or self.env.path2doc(target)
        if page in self.env.found_docs:
            new: nodes.Element = addnodes.pending_xref(
                refdomain="doc", reftarget=page, reftargetid=fragment or None, reftype="myst"
            )
            new["refdoc"], new["refexplicit"] = self.env.docname, True
        elif target.is_file():
            new = nodes.reference("", "", refuri=self.copy(target), internal=True)
        else:
            new = nodes.inline("", "")
        new += link.children
        link.replace_self(new)

    def copy(self, file: Path) -> str:
        """Copy a file to the site; its address as seen from this page."""
        self.env.note_dependency(file)
        if self.app.builder.format != "html":  # such as that of link checks
            return os.path.relpath(file, self.page.parent)
        copy = PurePosixPath(COPIES, file.relative_to(self.repository).as_posix())
        destination = Path(self.app.outdir) / copy
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination)
        return "/".join([*[".."] * self.env.docname.count("/"), str(copy)])


def _is_link(node: nodes.Node) -> bool:
    return isinstance(node, addnodes.pending_xref | addnodes.download_reference) and node["reftype"] == "myst"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository_pages", {}, "env", dict)
    app.connect("source-read", show_file)
    app.add_transform(RepositoryLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
