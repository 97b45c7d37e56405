"""Print the path of a packaged configuration, for commands that take a path only.

accelerate launch --config_file "$(python -m stepfuse.train.config_path accelerate/multi-gpu)" -m stepfuse.train.dpo …
"""

import argparse
import sys
from collections.abc import Sequence

from stepfuse.configs import FOLDER
from stepfuse.data.names import near_names, suggestion

ACCELERATE = FOLDER / "accelerate"  # as messages name it, which must be right with and without a checkout
FOLDERS = ("accelerate", "dpo", "ddpo", "distill", "eval", "sets")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the path of the configuration that the command line names, or the names of all."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfuse.train.config_path",
        description="Print the path of a packaged configuration; without a name, the names of all.",
    )
    parser.add_argument("name", nargs="?", help="FOLDER/NAME, for example accelerate/multi-gpu")
    name = parser.parse_args(arguments).name
    files = {f"{folder}/{file.stem}": file for folder in FOLDERS for file in sorted((FOLDER / folder).glob("*.yaml"))}
    if name is None:
        print("\n".join(files))
        return
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short not in files:
        folder, _, stem = short.rpartition("/")
        known = [name for name in files if name.startswith(f"{folder}/")] or list(files)
        near = near_names(stem, [name.rpartition("/")[2] for name in known])
        meant = suggestion([name for each in near for name in known if name.endswith(f"/{each}")])
        sys.exit(f"error: no packaged configuration {name!r}{meant or '; expected FOLDER/NAME'}")
    print(files[short])


if __name__ == "__main__":
    main()
