"""`stepfuse reward list`."""

from stepfuse.data.stages import stage
from stepfuse.data.text_table import terminal_width, text_table
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.scripts.cli.parser import Arguments, Parser, option

OTHERS = """
With weights in a folder: NAME:FOLDER. Other rewards: path/to/file.py:function,
path/to/file.yaml with reward:, worker: or http:, or the address of a server,
http://127.0.0.1:8765"""


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse reward list")
    text = "Print the license and the source of each reward (default: its size, and what it needs)."
    option(parser, "--sources", bool, text)


def run(arguments: Arguments) -> None:
    stage("Loading the rewards …")

    from stepfuse.rewards.named_reward import sources, table

    rows = sources(REWARDS) if arguments.sources else table(REWARDS)
    print(text_table(rows, terminal_width()))
    print(OTHERS)
