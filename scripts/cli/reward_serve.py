"""`stepfuse reward serve`."""

from pathlib import Path

from stepfuse.data.settings_fields import Bounds
from stepfuse.data.stages import import_libraries
from stepfuse.rewards.token_file import read_token
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.parser import Arguments, Parser, option

PORTS = Bounds(least=0, most=65535, expected="a whole number from 0 to 65535")


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse reward serve image_reward --port 8765")
    declare.reward(parser)
    text = "Address to listen on; 0.0.0.0 for all networks (default: %(default)s, this machine only)."
    option(parser, "--host", str, text, metavar="ADDRESS", default="127.0.0.1")
    option(parser, "--port", int, "Port to listen on, 0 for any free one.", default=8765, bounds=PORTS)
    text = (
        "File with the token that clients must send (default: the variable STEPFUSE_REWARD_TOKEN, or else a random "
        "one, which is printed)."
    )
    option(parser, "--token_file", Path, text, metavar="FILE")
    declare.device(parser)
    declare.reward_precision(parser)


def run(arguments: Arguments) -> None:
    read_token(arguments.token_file)  # refused before the libraries are loaded
    import_libraries()

    import torch

    from stepfuse.data.devices import allow_tf32
    from stepfuse.scripts.cli.load import prepare_device
    from stepfuse.scripts.recipes.rewards import serve

    if arguments.allow_tf32:
        allow_tf32()
    serve(
        arguments.name,
        host=arguments.host,
        port=arguments.port,
        token_file=arguments.token_file,
        device=prepare_device(arguments.device),
        reward_dtype=getattr(torch, arguments.reward_dtype),
    )
