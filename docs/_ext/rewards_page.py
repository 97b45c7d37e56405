"""`reference/rewards.md`: every reward of the catalogue, with what its entry and its docstring say."""

import inspect
from functools import partial

from markdown_text import as_markdown

from stepfuse.data.file_info import size_label
from stepfuse.data.markdown import markdown_table
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.named_reward import NamedReward


def rewards() -> str:
    """A table of all rewards, and a section for each, in Markdown."""
    rows = [
        (f"[`{name}`](#{_anchor(name)})", _yes_or_no(entry), as_markdown(entry.unit) or "–", _download(entry))
        for name, entry in REWARDS.items()
    ]
    parts = [markdown_table(("reward", "differentiable", "unit", "download at first use"), rows)]
    for name, entry in REWARDS.items():
        facts = {
            "Source": as_markdown(entry.source),
            "Licence": as_markdown(entry.licence),
            "Unit": as_markdown(entry.unit),
            "Differentiable": _yes_or_no(entry),
            "Networks in memory": size_label(entry.weights) if entry.weights else "",
            "Download at first use": _download(entry) if entry.files else "",
            "Needs": as_markdown(entry.needs) or (f"`pip install 'stepfuse[{entry.extra}]'`" if entry.extra else ""),
            "Runs in": "an environment of its own, which is created at first use" if entry.file else "",
        }
        lines = [f"- {label}: {text}" for label, text in facts.items() if text]
        parts += [f"({_anchor(name)})=\n\n## {name}", *_explanation(entry), "\n".join(lines)]
    return "\n\n".join(parts)


def _anchor(name: str) -> str:
    return f"reward-{name}"


def _yes_or_no(entry: NamedReward) -> str:
    return "yes" if entry.differentiable else "no"


def _download(entry: NamedReward) -> str:
    if entry.file:
        return "by its package"
    return size_label(sum(file.size for file in entry.files))


def _explanation(entry: NamedReward) -> list[str]:
    """The paragraphs of the docstring of a reward, without its sections of arguments."""
    made = entry.function or entry.build
    made = made.func if isinstance(made, partial) else made
    if made is None:
        return []
    text = (inspect.getdoc(made) or "").split("\n\nArgs:")[0].split("\n\nRaises:")[0].split("\n\nAttributes:")[0]
    return [as_markdown(paragraph) for paragraph in text.split("\n\n")]
