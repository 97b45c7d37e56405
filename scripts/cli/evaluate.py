"""`stepfuse evaluate`."""

from stepfuse.data.output_folder import require_empty_dir
from stepfuse.data.settings_file import find_config, load_settings
from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.checks import check_set
from stepfuse.scripts.cli.parser import Arguments, Parser, option
from stepfuse.scripts.oracle_world.page import FILES, world_files


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse evaluate emoji --config eval/emoji --output_dir outputs/evaluation",
        "It writes tables, plots of the fronts, and a page, report.html. An interrupted evaluation is continued by the "
        "same command.",
    )
    declare.adapter_set(parser, nargs="?")
    what = parser.group("what to measure")
    text = (
        "YAML file with the prompts, seeds, fusion rules, weights and rewards to measure, or the name of a packaged "
        "one, such as eval/emoji. Required with a set (default with --world: none)."
    )
    option(what, "--config", str, text, metavar="FILE_OR_NAME", complete=completion.configs("eval"))
    text = (
        "Measure the fusion rules on a Gaussian mixture with a known optimum, in place of a set (default: use the set)."
    )
    option(what, "--world", str, text, choices=("gmm",))
    declare.seed(what, "Random seed with --world; a config states its own.")
    declare.trust(what)
    speed = parser.group("speed and memory")
    declare.decode_batch_size(speed)
    declare.precision(speed)
    declare.reward_precision(speed)
    text = "Output folder; a folder with an unfinished evaluation of the same set and config is continued."
    replaced = "the evaluation in the output folder"
    declare.output_dir(parser.group("output"), "outputs/evaluation", text, replaced=replaced)
    parser.set_defaults(continued=True)


def run(arguments: Arguments) -> None:
    if arguments.world:
        _measure_world(arguments)
        return
    if arguments.set is None or arguments.config is None:
        raise ValueError("evaluate needs a set and --config FILE_OR_NAME, such as emoji --config eval/emoji")
    config = find_config(arguments.config, "eval")
    begun = (arguments.output_dir / "evaluation.json").exists()
    require_empty_dir(arguments.output_dir, overwrite=arguments.overwrite or begun, option="--output_dir")
    names = check_set(arguments.set)

    import_libraries()

    import torch

    from stepfuse.data.devices import allow_tf32
    from stepfuse.scripts.cli.load import prepare_device
    from stepfuse.scripts.evaluation.config import EvaluationConfig, cells_of
    from stepfuse.scripts.evaluation.report import sentences
    from stepfuse.scripts.evaluation.run import evaluate

    if arguments.allow_tf32:
        allow_tf32()
    device = prepare_device(arguments.device)
    settings = load_settings(config, EvaluationConfig)
    if names is not None:  # else the set is downloaded first
        try:
            cells_of(settings, names)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error
    summary = evaluate(
        arguments.set,
        settings,
        arguments.output_dir,
        overwrite=arguments.overwrite,
        device=device,
        dtype=getattr(torch, arguments.dtype),
        command=f"stepfuse evaluate {arguments.set} --config {arguments.config}",
        trust_rewards=arguments.trust_rewards,
        reward_dtype=getattr(torch, arguments.reward_dtype),
        decode_batch_size=arguments.decode_batch_size,
    )
    if summary:  # the main process
        rules = {cell.label: cell.rule for cell in cells_of(settings, list(summary["objectives"]))}
        print("\n".join(f"- {line}" for line in sentences(summary, rules)))
        print(arguments.output_dir / "report.html")


def _measure_world(arguments: Arguments) -> None:
    if arguments.set or arguments.config:
        raise ValueError("--world needs no set and no --config; give one or the other")
    output = arguments.output_dir
    require_empty_dir(output, overwrite=arguments.overwrite, ours=world_files, writes=FILES, option="--output_dir")

    import_libraries()

    from stepfuse.scripts.oracle_world.measure import measure_world

    measure_world(output, seed=arguments.seed)
    print((output / "world.md").read_text(encoding="utf-8"))
