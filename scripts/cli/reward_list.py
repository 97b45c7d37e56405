"""`stepfuse reward list`."""

from stepfuse.data.stages import stage
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.scripts.cli.parser import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse reward list")


def run(arguments: Arguments) -> None:
    stage("Loading the rewards …")

    from stepfuse.rewards.named_reward import table

    rows = table(REWARDS)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nWith weights in a folder: NAME:FOLDER. Other rewards: path/to/file.py:function, or path/to/file.yaml with "
        "reward:, worker: or http:, or the address of a server, http://127.0.0.1:8765"
    )
