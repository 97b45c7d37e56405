"""`stepfuse reward score`."""

from pathlib import Path

from stepfuse.data.output_file import require_new_file
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_picture
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse reward score image_reward --images outputs/images --prompts prompts.txt --output scores.csv",
        "An interrupted run is continued by the same command.",
    )
    declare.reward(parser)
    option(parser, "--images", Path, "Folder of the images; required.", metavar="DIR", required=True)
    text = (
        "Text file with one prompt per line, in the order of the image names, or with one line for all images; or a "
        ".csv or .jsonl file with the columns file_name and prompt. Required."
    )
    option(parser, "--prompts", Path, text, metavar="FILE", required=True)
    declare.batch_size(parser, "Images scored at once.", 16)
    declare.device(parser)
    declare.reward_precision(parser)
    declare.output(parser, "scores.csv", "CSV file with the columns file_name, prompt and score.")
    text = "Picture to write of the best images with their scores, such as best.png (default: none)."
    option(parser, "--picture", Path, text, metavar="FILE")
    parser.set_defaults(continued=True)


def run(arguments: Arguments) -> None:
    require_new_file(arguments.output, overwrite=arguments.overwrite)
    if arguments.picture is not None:
        check_picture(arguments.picture, overwrite=arguments.overwrite, flag="--picture")
        if arguments.picture.resolve() == arguments.output.resolve():
            raise ValueError(f"--output and --picture are both {arguments.picture}; give one another name")
    if not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images}; expected a folder of images")
    if not arguments.prompts.is_file():
        raise ValueError(f"--prompts {arguments.prompts}; expected a file, with one prompt per line for instance")

    import_libraries()

    import torch

    from stepfuse.data.devices import allow_tf32
    from stepfuse.scripts.cli.load import prepare_device
    from stepfuse.scripts.recipes.rewards import score_folder

    if arguments.allow_tf32:
        allow_tf32()
    score_folder(
        arguments.name,
        arguments.images,
        arguments.prompts,
        arguments.output,
        device=prepare_device(arguments.device),
        batch_size=arguments.batch_size,
        picture=arguments.picture,
        reward_dtype=getattr(torch, arguments.reward_dtype),
    )
