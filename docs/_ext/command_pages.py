"""`reference/commands.md`: every command and option, from the parsers that the commands use."""

import argparse
import inspect
import os
from collections.abc import Iterator

from markdown_text import as_markdown, code, directive
from settings_page import TRAINING, setting_id

from stepfuse.scripts.cli.main import COMMANDS, GROUPS, make_parser
from stepfuse.train.arguments import SettingsParser
from stepfuse.train.settings import TrainSettings

WIDE = "10000"  # columns, so that no line of a help page is wrapped


def commands() -> str:
    """The sections of the page, in Markdown."""
    os.environ["COLUMNS"] = WIDE
    parts = []
    top = make_parser()
    for name in COMMANDS:
        parser: argparse.ArgumentParser = top
        for word in name.split():
            parser = _subparsers(parser).choices[word]
        depth = "###" if " " in name else "##"
        parts += [f"{depth} stepfuse {name}", *_explanation(parser)]
        if name not in GROUPS:
            parts += _options(parser)
    parts += ["## Training programs", inspect.cleandoc(_PROGRAMS)]
    for settings in TRAINING.values():
        parts += _program(settings)
    return "\n\n".join(parts)


_PROGRAMS = """
The programs of training are started by [accelerate](https://huggingface.co/docs/accelerate), in one process or in
several. Every setting is a flag, and a line of the YAML file that `--config` names; flags take precedence. The links
lead to the [settings](settings.md).
"""


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _explanation(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Usage, description and example."""
    yield as_markdown(parser.description or "")
    lines = [" ".join(parser.format_usage().removeprefix("usage: ").split())]
    heading, _, example = (parser.epilog or "").partition("\n  ")
    yield code("text", lines[0])
    if heading == "example:":
        yield f"Example:\n\n{code('bash', example)}"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield directive("program", parser.prog)
    titles = {"positional arguments": "Arguments", "options": "Options"}
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        shown = [action for action in shown if action.dest != "help"]
        if shown:
            title = titles.get(group.title or "", f"{group.title}".capitalize())
            yield directive("rubric", title)
            yield from map(_option, shown)


def _option(action: argparse.Action) -> str:
    value = str(action.metavar or action.dest)
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs in ("+", "*"):
        value += " …"
    names = action.option_strings
    signature = ", ".join(name if action.nargs == 0 else f"{name} {value}" for name in names) if names else value
    text = action.help or ""
    if names and action.required and "required" not in text.lower():
        text = f"Required. {text}"
    return directive("option", signature, as_markdown(text))


def _program(settings: type[TrainSettings]) -> Iterator[str]:
    """A training program: its settings are explained on the page of settings."""
    parser = SettingsParser(settings)
    yield f"### train/{settings.program}.py"
    yield as_markdown(parser.description or "")
    module = f"accelerate launch --quiet -m stepfuse.train.{settings.program}"
    first = f" [{settings.positional.upper()}]" if settings.positional else ""
    yield code("text", f"{module}{first} [--config FILE] [--SETTING VALUE ...]")
    yield directive("program", f"stepfuse.train.{settings.program}")
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        config = [action for action in shown if action.dest == "config"]
        flags = [action for action in shown if action.dest not in ("config", "help")]
        yield from map(_option, config)
        if flags:
            links = (f"{{setting}}`--{flag.dest} <{setting_id(settings, flag.dest)}>`" for flag in flags)
            yield f"**{group.title}**: {', '.join(links)}"
