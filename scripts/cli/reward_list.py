"""`stepfuse reward list`."""

from stepfuse.scripts.cli.parser import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse reward list")


def run(arguments: Arguments) -> None:
    from stepfuse.scripts.recipes.rewards import list_rewards

    list_rewards()
