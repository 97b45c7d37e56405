"""`stepfuse set merge`."""

from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_safetensors, check_set, check_weights
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set merge emoji --weights alignment=0.7,compressibility=0.3 --output lora.safetensors")
    declare.adapter_set(parser)
    text = "Weight of each objective; they are normalised to sum to 1 (default: the set's default weights)."
    declare.weights(parser, text)
    declare.strength(parser, "Factor of the whole LoRA: 0 is the base model, 1 the strength of training.")
    text = "Truncate each layer to this rank by its singular values (default: the sum of the ranks, which is exact)."
    option(parser, "--rank", int, text)
    text = "Layout of the file; kohya for ComfyUI and AUTOMATIC1111."
    option(parser, "--format", str, text, choices=("diffusers", "kohya"), default="diffusers")
    declare.output(parser, "lora.safetensors", "Output file, a name that ends in .safetensors.")


def run(arguments: Arguments) -> None:
    check_safetensors(arguments.output, overwrite=arguments.overwrite)
    texts = [] if arguments.weights is None else [arguments.weights]
    weights = check_weights(texts, check_set(arguments.set))

    import_libraries()

    from stepfuse.fuse.sets.export import merge

    rank, error = merge(
        arguments.set,
        weights[0] if weights else None,
        arguments.output,
        strength=arguments.strength,
        rank=arguments.rank,
        form=arguments.format,
        overwrite=arguments.overwrite,
    )
    accuracy = f"{100 * error:.2g} % of the exact soup left out" if error else "the exact soup"
    print(f"{arguments.output}: rank {rank}, {accuracy}")
