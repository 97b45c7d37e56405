"""`stepfuse benchmark training`."""

from dataclasses import replace
from typing import Any

from stepfuse.data.output_file import require_new_file
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.benchmark.settings import TrainingBenchmark
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.options import add_settings, settings_of
from stepfuse.scripts.cli.parser import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.explain("stepfuse benchmark training --model emoji --timestep_fraction 0.5 --output training.json")
    add_settings(parser, TrainingBenchmark)
    declare.precision(parser.group("how to run"), "the models")
    declare.output(parser.group("output"), "training.json", "JSON file for the results.")


def run(arguments: Arguments) -> None:
    settings = settings_of(TrainingBenchmark, arguments, device=arguments.device or "cuda")
    require_new_file(arguments.output, overwrite=arguments.overwrite)

    import_libraries()

    from stepfuse.scripts.benchmark.training import benchmark_training, training_table
    from stepfuse.scripts.cli.load import prepare_device, write_results

    device: Any = prepare_device(arguments.device)
    write_results(benchmark_training, training_table, replace(settings, device=device), arguments.output)
