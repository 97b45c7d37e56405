"""`stepfuse benchmark serve`."""

from dataclasses import replace

from stepfuse.data.output_file import require_new_file
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.benchmark.serve_settings import ServeBenchmark
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.options import add_settings, settings_of
from stepfuse.scripts.cli.parser import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse benchmark serve emoji --output serve.json",
        "Requests arrive at random times. A server on this machine computes them together, and one after the other; "
        "diffusers' pipeline computes them one after the other, by set_adapters and without HTTP.",
    )
    declare.adapter_set(parser)
    add_settings(parser, ServeBenchmark)
    declare.precision(parser.group("how to run"), "the models")
    declare.output(parser.group("output"), "serve.json", "JSON file for the results.")


def run(arguments: Arguments) -> None:
    check_set(arguments.set)
    settings = settings_of(ServeBenchmark, arguments, model=str(arguments.set))
    require_new_file(arguments.output, overwrite=arguments.overwrite)

    import_libraries()

    from stepfuse.scripts.cli.load import prepare_device, write_results

    try:
        from stepfuse.scripts.benchmark.serve import benchmark_serve, serve_table
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'stepfuse[serve]'") from error
    write_results(
        benchmark_serve, serve_table, replace(settings, device=prepare_device(arguments.device)), arguments.output
    )
