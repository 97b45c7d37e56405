"""`stepfuse serve`."""

from pathlib import Path

from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.options import add_settings, settings_of
from stepfuse.scripts.cli.parser import Arguments, Parser, option
from stepfuse.scripts.serve.settings import TOKEN, ServeSettings


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse serve emoji",
        "The page is at the address that is printed; programs draw with OpenAI's clients.",
    )
    text = f"{declare.SET} Several sets must have the same base model, which they share."
    declare.adapter_set(parser, text, nargs="+")
    add_settings(parser, ServeSettings)
    text = (
        f"File with the token that clients must send (default: the variable {TOKEN}, or none where only this machine "
        "is listened to)."
    )
    option(parser.group("address"), "--token_file", Path, text, metavar="FILE")
    declare.precision(parser.group("speed and memory"))


def run(arguments: Arguments) -> None:
    for each in arguments.set:
        check_set(each)
    settings = settings_of(ServeSettings, arguments)

    import torch

    from stepfuse.scripts.cli.load import prepare_device

    try:
        from stepfuse.scripts.serve.run import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'stepfuse[serve]'") from error
    serve(
        arguments.set,
        settings,
        token_file=arguments.token_file,
        dtype=getattr(torch, arguments.dtype),
        device=prepare_device(arguments.device),
    )
