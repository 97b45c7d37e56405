"""`stepfuse demo`."""

from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.parser import Arguments, Parser, option
from stepfuse.scripts.recipes.demo_folder import SETTINGS, check_early


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse demo --output_dir outputs/demo",
        "It takes less than 5 minutes on two CPU cores, and needs no GPU and no download. An interrupted demo is "
        "continued by the same command.",
    )
    text = "Output folder for the adapters, their set, the pictures slider.png and front.png, and results.json."
    declare.output_dir(parser, "outputs/demo", text, replaced="the demo in the output folder")
    text = "Number of rewards: lightness and subject_size, or also contrast, which takes longer."
    option(parser, "--objectives", int, text, choices=(2, 3), default=2)
    declare.seed(parser, "Random seed of training and of sampling.")
    text = (
        "Train for one step and measure on 4 prompts, to check that everything runs; the rewards are not expected to "
        "improve (default: the full demo)."
    )
    option(parser, "--quick", bool, text)
    parser.set_defaults(continued=True)


def run(arguments: Arguments) -> None:
    given = {name: getattr(arguments, name) for name in SETTINGS}
    check_early(arguments.output_dir, given, overwrite=arguments.overwrite)
    import_libraries()

    from stepfuse.scripts.recipes.demo import demo

    demo(arguments.output_dir, overwrite=arguments.overwrite, **given)
