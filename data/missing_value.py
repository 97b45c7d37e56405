"""What argparse says of an option without its value, with what the value is."""

import argparse
from collections.abc import Mapping

MISSING = "expected one argument"


def with_help(message: str, options: Mapping[str, argparse.Action]) -> str:
    """Append to an error about a missing value the first sentence of the option's help; other errors stay as they are.

    Args:
        message: of argparse, `argument --steps: expected one argument`.
        options: by their names, `--steps`.
    """
    name = message.removeprefix("argument ").partition(": ")[0].partition("/")[0]
    if name not in options or not message.endswith(MISSING):
        return message
    text = (options[name].help or "").replace("%%", "%").partition(" (default")[0]
    return f"{message.removesuffix(MISSING)}expected a value ({text.partition('. ')[0].removesuffix('.')})"
