"""`stepfuse set card`."""

import json
from pathlib import Path

from stepfuse.data.names import suggestion
from stepfuse.data.near_folders import near_folders
from stepfuse.data.output_file import atomic_file
from stepfuse.data.stages import import_libraries
from stepfuse.data.text_files import read_text
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set card outputs/set --evaluation outputs/evaluation --license apache-2.0")
    declare.adapter_set(parser, declare.SET_FOLDER)
    text = (
        "Output folder of `stepfuse evaluate` for this set, whose results go into the card (default: the results "
        "stored in the set, if any)."
    )
    option(parser, "--evaluation", Path, text, metavar="DIR")
    declare.license(parser, "adapters that do not record one", "none")
    declare.license(parser, "the base model", "as the set records it", "--base_license")
    declare.prompt(parser, "Prompt of a row of the picture; repeat for more rows (default: three held-out prompts).")
    option(parser, "--no_strip", bool, "Generate no picture; an existing one stays in the set (default: generate one).")
    declare.seed(parser, "Random seed of the picture.")
    declare.precision(parser)


def run(arguments: Arguments) -> None:
    check_set(arguments.set)

    from stepfuse.fuse.sets.manifest import STRIP, check_writable

    folder = check_writable(arguments.set)

    import_libraries()

    from stepfuse.fuse.sampling.pictures import STRIP_ROWS, draw_strip
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.fuse.sets.card import check_card, write_card
    from stepfuse.fuse.sets.edit import add_evaluation, set_licences
    from stepfuse.scripts.cli.load import heldout_prompts, load_sampler

    loaded = load_set(folder, read_weights=arguments.no_strip)  # those of a picture are read as it is drawn
    check_card(folder)  # before minutes go into the picture
    evaluation = arguments.evaluation
    if evaluation is not None and not (evaluation / "summary.json").is_file():
        near = suggestion(near_folders(evaluation, lambda folder: (folder / "summary.json").is_file()))
        raise ValueError(f"no summary.json in {evaluation}; expected the output of stepfuse evaluate{near}")
    if not arguments.no_strip:
        prompts = arguments.prompt or heldout_prompts(loaded, STRIP_ROWS)
        strip = draw_strip(load_sampler(loaded, arguments), prompts, seed=arguments.seed, progress=True)
        with atomic_file(folder / STRIP) as temporary:
            strip.save(temporary)
    if arguments.license or arguments.base_license:
        loaded = set_licences(folder, license=arguments.license, base_license=arguments.base_license)
    if evaluation is not None:
        loaded = add_evaluation(folder, json.loads(read_text(evaluation / "summary.json")))
    print(write_card(folder, loaded, evaluation))
