"""`stepfuse set validate`."""

from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse set validate emoji")
    declare.adapter_set(parser)
    option(parser, "--load", bool, "Load the base model and every adapter too (default: check the files only).")


def run(arguments: Arguments) -> None:
    check_set(arguments.set)

    import_libraries()

    from stepfuse.fuse.sets.adapter_set import load_set

    loaded = load_set(arguments.set, read_weights=not arguments.load)
    if arguments.load:
        from stepfuse.fuse.backbones.loading import quiet_libraries
        from stepfuse.fuse.sampling.sampler import FusedSampler

        quiet_libraries()
        FusedSampler.from_pretrained(loaded)
    print(f"{arguments.set}: valid; {len(loaded.adapters)} adapters of base {loaded.base['name_or_path']!r}")
