"""`stepfuse serve`."""

from importlib.util import find_spec
from pathlib import Path

from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.options import add_settings, settings_of
from stepfuse.scripts.cli.parser import Arguments, Parser, option
from stepfuse.scripts.serve.settings import TOKEN, ServeSettings

EXTRA = ("fastapi", "uvicorn", "greenlet", "prometheus_client")  # the modules of the extra `serve`


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse serve emoji-flow",
        "The page is at the address that is printed; programs request images with OpenAI's clients.",
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

    for name in EXTRA:
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed; pip install 'stepfuse[serve]'")

    from stepfuse.scripts.serve.address import access_of, listen

    access = access_of(settings, arguments.token_file)
    with listen(settings.host, settings.port) as listener:
        import_libraries()

        import torch

        from stepfuse.scripts.cli.load import prepare_device
        from stepfuse.scripts.serve.run import serve

        serve(
            arguments.set,
            settings,
            access=access,
            listener=listener,
            dtype=getattr(torch, arguments.dtype),
            device=prepare_device(arguments.device),
        )
