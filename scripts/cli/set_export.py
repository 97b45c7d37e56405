"""`stepfuse set export`."""

import argparse
from pathlib import Path

from stepfuse.data.names import nearest
from stepfuse.data.output_folder import resolve_folder
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.checks import check_safetensors, check_set
from stepfuse.scripts.cli.options import option
from stepfuse.scripts.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set export emoji alignment --format kohya --output alignment.safetensors")
    declare.adapter_set(parser)
    text = "Name of the adapter to export (default: all adapters)."
    option(parser, "objective", str, text, metavar="OBJECTIVE", nargs="?", complete=completion.objectives)
    text = "kohya: a file for ComfyUI and AUTOMATIC1111; peft: a folder; diffusers: a file."
    option(parser, "--format", str, text, choices=("kohya", "peft", "diffusers"), default="kohya")
    text = "Output file of one adapter, or output folder for all (default: in the folder FORMAT-loras)."
    option(parser, "--output", Path, text, metavar="PATH")
    declare.overwrite(parser, "output files")


def check_export_output(output: Path, objective: str | None, form: str, *, overwrite: bool) -> None:
    """Check the output: a file for one adapter, except in peft's format, and a folder for all."""
    if form != "peft" and objective is not None:
        check_safetensors(output, overwrite=overwrite)
    elif output.is_file():
        what = "all adapters are written into a folder; name one adapter for one file" if objective is None else form
        raise ValueError(f"--output {output} is a file; expected a folder ({what})")
    else:
        resolve_folder(output)


def run(arguments: argparse.Namespace) -> None:
    objective, names = arguments.objective, check_set(arguments.set, oracles=True)
    if objective is not None and names is not None and objective not in names:
        known = f"it has {', '.join(names)}{nearest(objective, names)}"
        raise ValueError(f"set {arguments.set} has no adapter {objective!r}; {known}")
    if arguments.output is not None:
        check_export_output(arguments.output, objective, arguments.format, overwrite=arguments.overwrite)

    from stepfuse.fuse.sets.export import export

    options = {"form": arguments.format, "output": arguments.output, "overwrite": arguments.overwrite}
    print(export(arguments.set, objective, **options))
