"""`stepfuse pull`."""

from pathlib import Path

from stepfuse.data.output_folder import require_empty_dir
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse pull OWNER/NAME@REVISION outputs/set")
    text = "Repository on the hub; OWNER/NAME@REVISION for a branch, tag or commit."
    declare.adapter_set(parser, text, metavar="OWNER/NAME")
    option(parser, "output", Path, "Output folder (default: NAME).", metavar="FOLDER", nargs="?")
    declare.overwrite(parser, "the set in the output folder", folder=True)


def run(arguments: Arguments) -> None:
    output = arguments.output or Path(str(arguments.set).rpartition("/")[2].partition("@")[0])
    check_set(arguments.set)
    require_empty_dir(output, overwrite=arguments.overwrite)

    import_libraries()

    from stepfuse.fuse.sets.create import copy_set

    loaded = copy_set(arguments.set, output, overwrite=arguments.overwrite)
    print(f"{output}: {', '.join(loaded.names)}")
