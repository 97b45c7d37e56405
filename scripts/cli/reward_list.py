"""`stepfuse reward list`."""

import argparse

from stepfuse.scripts.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse reward list")


def run(arguments: argparse.Namespace) -> None:
    from stepfuse.scripts.recipes.rewards import list_rewards

    list_rewards()
