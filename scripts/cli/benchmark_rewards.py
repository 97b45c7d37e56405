"""`stepfuse benchmark rewards`."""

from stepfuse.data.output_file import require_new_file
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.benchmark.checkout import require_checkout
from stepfuse.scripts.benchmark.settings import RewardBenchmark
from stepfuse.scripts.cli import declare
from stepfuse.scripts.cli.options import add_settings, settings_of
from stepfuse.scripts.cli.parser import Arguments, Parser


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse benchmark rewards --rewards image_reward --output rewards.json",
        "Both have the same random weights. Each package runs in an environment of its own, of several GB, which is "
        "made at first use. The baselines need a checkout of the repository.",
    )
    add_settings(parser, RewardBenchmark)
    declare.output(parser, "rewards.json", "JSON file for the results.")


def run(arguments: Arguments) -> None:
    require_checkout()
    settings = settings_of(RewardBenchmark, arguments)
    require_new_file(arguments.output, overwrite=arguments.overwrite)

    import_libraries()

    from stepfuse.scripts.benchmark.rewards import benchmark_rewards, reward_table
    from stepfuse.scripts.cli.load import write_results

    write_results(benchmark_rewards, reward_table, settings, arguments.output)
