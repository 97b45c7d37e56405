"""Parts of the reference that are made from the code when the site is built, below what their pages say."""

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PAGES = ("reference/commands", "reference/settings", "reference/rewards")


def add_generated(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the generated part of a page to its source."""
    if docname not in PAGES:
        return
    from command_pages import commands
    from rewards_page import rewards
    from settings_page import settings

    makers = {"reference/commands": commands, "reference/settings": settings, "reference/rewards": rewards}
    source[0] = f"{source[0].rstrip()}\n\n{makers[docname]()}\n"


def list_generated(*_: object) -> list[str]:
    """These pages are outdated in every build: what they depend on is code."""
    return [*PAGES]


def parse_setting(env: BuildEnvironment, signature: str, node: addnodes.desc_signature) -> str:
    """`train.seed | integer: 0 or more | 0`, shown without the program, as `seed`, its type and its default."""
    name, kind, default = (part.strip() for part in signature.rsplit(" | ", 2))
    node += addnodes.desc_name("", name.rpartition(".")[2])
    end = "; unset by default" if default == "-" else "; default "
    node += nodes.inline("", f" {kind}{end}", classes=["setting-kind"])
    if default != "-":
        node += nodes.literal("", default)
    return name


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_object_type("setting", "setting", "setting; %s", parse_node=parse_setting)
    app.connect("source-read", add_generated)
    app.connect("env-get-outdated", list_generated)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
