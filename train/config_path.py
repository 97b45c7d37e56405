"""Print the path of a packaged configuration, for commands that take a path only.

accelerate launch --config_file "$(python -m stepfuse.train.config_path accelerate/multi-gpu)" -m stepfuse.train.dpo …
"""

import argparse
import sys
from collections.abc import Sequence

from stepfuse.configs import FOLDER
from stepfuse.data.names import nearest
from stepfuse.data.settings_file import find_config

FOLDERS = ("accelerate", "dpo", "ddpo", "eval", "sets")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the path of the configuration that the command line names, or the names of all."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfuse.train.config_path",
        description="Print the path of a packaged configuration; without a name, the names of all.",
    )
    parser.add_argument("name", nargs="?", help="FOLDER/NAME, for example accelerate/multi-gpu")
    name = parser.parse_args(arguments).name
    try:
        print("\n".join(_names()) if name is None else _find(name))
    except ValueError as error:
        sys.exit(f"error: {error}")


def _find(name: str) -> str:
    short = name.removeprefix("configs/")
    folder, slash, _ = short.partition("/")
    if not slash or folder not in FOLDERS:
        raise ValueError(f"no packaged configuration {name!r}{nearest(short, _names())}; expected FOLDER/NAME")
    return str(find_config(short, folder))


def _names() -> list[str]:
    return [f"{folder}/{file.stem}" for folder in FOLDERS for file in sorted((FOLDER / folder).glob("*.yaml"))]


if __name__ == "__main__":
    main()
