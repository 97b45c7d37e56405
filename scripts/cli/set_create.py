"""`stepfuse set create`."""

from pathlib import Path

from stepfuse.data.output_folder import require_empty_dir
from stepfuse.data.stages import import_libraries
from stepfuse.fuse.rules.registry import RULES
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set create outputs/set --adapter outputs/alignment --adapter outputs/compressibility")
    option(parser, "output", Path, "Output folder of the set.", metavar="FOLDER")
    text = (
        "Folder of an adapter, as written by training or found in another set; that of a training with several "
        "objectives stands for all of their adapters. Required; repeat for each."
    )
    option(parser, "--adapter", Path, text, metavar="DIR", action="append", required=True)
    text = (
        "Folder of an adapter trained on a weighted sum of the rewards (--reward weighted:…), which evaluations "
        "compare fusion with; repeat for several (default: none)."
    )
    option(parser, "--oracle", Path, text, metavar="DIR", action="append", default=[])
    text = (
        "Default fusion rule of the set (default: product, or the rule that the adapters were trained for if they were "
        "trained together)."
    )
    option(parser, "--rule", str, text, choices=RULES)
    text = (
        "Variance of the base policy's denoising steps, as DDIM's eta, from 0 (deterministic) to 1 (DDPM). It is used "
        "where the strength is not 1 (default: 1.0)."
    )
    declare.variance(parser, "reference_", "the base policy", text)
    text = (
        "Guidance of the images that are generated with the set: shared, by the base's unconditional prediction; full, "
        "by each adapter's own; embedded, an input of the network; off (default: as the adapters were trained)."
    )
    declare.guidance(parser, text, "Scale of that guidance, such as 4.5 (default: as in training).")
    text = (
        "Hub id of the base model, recorded in place of the local folder that the adapters were trained from (default: "
        "as the adapters record it)."
    )
    option(parser, "--base", str, text, metavar="OWNER/NAME")
    declare.license(parser, "the base model", "none", "--base_license")
    declare.license(parser, "the adapters", "as the adapters record it")
    text = "Store the weights in float16, which halves their size (default: in the type they have)."
    option(parser, "--half", bool, text)
    declare.overwrite(parser, "the set in the output folder", folder=True)


def run(arguments: Arguments) -> None:
    from stepfuse.fuse.sets.wrong_source import check_has_adapters

    require_empty_dir(arguments.output, overwrite=arguments.overwrite)
    for folder in (*arguments.adapter, *arguments.oracle):
        check_has_adapters(folder)

    import_libraries()
    base_schedule = declare.schedule_of(arguments, "reference_", default=1.0)

    from stepfuse.fuse.sets.create import create_set

    created = create_set(
        arguments.output,
        arguments.adapter,
        oracles=arguments.oracle,
        rule=arguments.rule,
        base_schedule=base_schedule,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        half=arguments.half,
        base=arguments.base,
        base_license=arguments.base_license,
        license=arguments.license,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.output}: {', '.join(adapter.name for adapter in created.all_adapters)}")
