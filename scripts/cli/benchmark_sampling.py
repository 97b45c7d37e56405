"""`stepfuse benchmark sampling`, also `stepfuse benchmark SET`."""

from dataclasses import replace
from typing import Any

from stepfuse.data.output_file import require_new_file
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.benchmark.architectures import ARCHITECTURES
from stepfuse.scripts.benchmark.settings import SamplingBenchmark
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.options import add_settings, settings_of
from stepfuse.scripts.cli.parser import Arguments, Parser, option

KINDS = ("sampling", "rewards", "training", "serve")  # of benchmark, which may follow where a set may


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse benchmark sampling emoji --output bench.json", "Give a set, or --architecture for random weights."
    )
    text = "Adapter set whose base model is timed, with random LoRAs of the layout of its first adapter."
    declare.adapter_set(parser, text, nargs="?", complete=_sets_or_kinds)
    text = (
        "Architecture with random weights in place of a set: Stable Diffusion 1.5, XL or 3.5 medium, FLUX.1 dev or "
        "Qwen-Image (default: the set's base model)."
    )
    option(parser.group("what to measure"), "--architecture", str, text, choices=tuple(ARCHITECTURES))
    add_settings(parser, SamplingBenchmark)
    declare.precision(parser.group("how to run"), "the models")
    declare.output(parser.group("output"), "bench.json", "JSON file for the results.")


def _sets_or_kinds(prefix: str, **_: Any) -> list[str]:
    return [*KINDS, *completion.adapter_sets(prefix)]


def run(arguments: Arguments) -> None:
    if (arguments.set is None) == (arguments.architecture is None):
        raise ValueError("benchmark needs a set or --architecture, one of them")
    require_new_file(arguments.output, overwrite=arguments.overwrite)
    if arguments.set is not None:
        check_set(arguments.set, instead=KINDS)
    settings = settings_of(SamplingBenchmark, arguments, model=arguments.architecture or str(arguments.set))

    import_libraries()

    from stepfuse.scripts.benchmark.sampling import benchmark_sampling, sampling_table
    from stepfuse.scripts.cli.load import prepare_device, write_results

    settings = replace(settings, device=prepare_device(arguments.device))
    write_results(benchmark_sampling, sampling_table, settings, arguments.output)
