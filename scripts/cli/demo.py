"""`stepfuse demo`."""

from stepfuse.data import emoji
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse demo --output_dir outputs/demo",
        "It takes about 6 minutes on two CPU cores and needs no GPU and no download. An interrupted demo is continued "
        "by the same command.",
    )
    text = (
        "Output folder for the two adapters, the set of both, the pictures slider.png and front.png, and results.json."
    )
    declare.output_dir(parser, "outputs/demo", text, replaced="the demo in the output folder")
    text = "Embedded base model: emoji-flow, a small Stable Diffusion 3, or emoji, a small Stable Diffusion 1."
    option(parser, "--base", str, text, choices=tuple(emoji.BASES), default="emoji-flow")
    declare.seed(parser, "Random seed of training and of sampling.")
    text = (
        "Train for one step and measure on 8 prompts, to check that everything runs; the rewards are not expected to "
        "improve (default: the full demo)."
    )
    option(parser, "--quick", bool, text)
    parser.set_defaults(continued=True)


def run(arguments: Arguments) -> None:
    from stepfuse.scripts.recipes.demo import demo

    names = ("base", "seed", "overwrite", "quick")
    demo(arguments.output_dir, **{name: getattr(arguments, name) for name in names})
