"""`stepfuse set profile`."""

from stepfuse.data.prompts import PROMPT_SETS, load_prompts, parse_prompts
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.completion import one_of
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse set profile outputs/set --prompts prompts.txt",
        "The result, a KL divergence in nats, is stored in the set; `stepfuse sample --gate` uses it.",
    )
    declare.adapter_set(parser, declare.SET_FOLDER)
    text = (
        "Text file with one prompt per line, or a prompt set such as partiprompts:32 for 32 of its prompts (default: "
        "colours-heldout:16, or emoji-heldout:16 for the bundled base models)."
    )
    option(parser, "--prompts", str, text, metavar="FILE_OR_NAME", complete=one_of(PROMPT_SETS, "txt"))
    option(parser, "--steps", int, "Number of denoising steps (default: that of the set).")
    declare.guidance(parser)
    declare.seed(parser)
    declare.batch_size(parser)
    declare.precision(parser)


def run(arguments: Arguments) -> None:
    if arguments.prompts is not None:
        parse_prompts(arguments.prompts)
    check_set(arguments.set)

    from stepfuse.fuse.sets.manifest import check_writable

    check_writable(arguments.set)  # before minutes go into measuring

    import_libraries()

    from stepfuse.fuse.sampling.measure_gaps import describe_gaps, measure_gaps
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.fuse.sets.edit import add_profile
    from stepfuse.scripts.cli.load import heldout_prompts, load_sampler

    loaded = load_set(arguments.set, read_weights=False)
    prompts = load_prompts(arguments.prompts) if arguments.prompts else heldout_prompts(loaded, 16)
    sampler = load_sampler(loaded, arguments, guidance=arguments.guidance, guidance_scale=arguments.guidance_scale)
    measured = measure_gaps(
        sampler, prompts, num_inference_steps=arguments.steps, seed=arguments.seed, batch_size=arguments.batch_size
    )
    add_profile(arguments.set, measured)
    print(describe_gaps(measured))
