"""`stepfuse set export`."""

from pathlib import Path

from stepfuse.data.names import nearest
from stepfuse.data.output_folder import resolve_folder
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.checks import check_safetensors, check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option


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


def run(arguments: Arguments) -> None:
    objective, output, names = arguments.objective, arguments.output, check_set(arguments.set, oracles=True)
    if objective is not None and names is not None and objective not in names:
        known = f"it has {', '.join(names)}{nearest(objective, names)}"
        raise ValueError(f"set {arguments.set} has no adapter {objective!r}; {known}")
    if output is not None:
        if arguments.format != "peft" and objective is not None:
            check_safetensors(output, overwrite=arguments.overwrite)
        elif output.is_file():
            what = arguments.format if objective else "all adapters are written into a folder; name one for one file"
            raise ValueError(f"--output {output} is a file; expected a folder ({what})")
        else:
            resolve_folder(output)

    import_libraries()

    from stepfuse.fuse.sets.export import export

    print(export(arguments.set, objective, form=arguments.format, output=output, overwrite=arguments.overwrite))
