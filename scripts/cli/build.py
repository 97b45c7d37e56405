"""`stepfuse build`."""

from pathlib import Path

from stepfuse.data.run_lock import check_free
from stepfuse.data.settings_file import find_config, load_settings
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.parser import Arguments, Parser, option
from stepfuse.scripts.recipes.build_config import BuildConfig


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse build sets/emoji", "An interrupted build is continued by the same command.")
    text = (
        "YAML file that lists the trainings, the evaluation and the output folder of the set, or the name of a "
        "packaged one: sets/emoji, sets/sd15, sets/sdxl or sets/sd35."
    )
    option(parser, "config", str, text, metavar="CONFIG", complete=completion.configs("sets"))
    declare.device(parser)
    parser.set_defaults(continued=True)


def run(arguments: Arguments) -> None:
    config = find_config(arguments.config, "sets")
    check_free(Path(load_settings(config, BuildConfig).output_dir), empty=False)

    import_libraries()

    from stepfuse.scripts.cli.load import prepare_device
    from stepfuse.scripts.recipes.build_set import build

    print(build(config, device=prepare_device(arguments.device)))
