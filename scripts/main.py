"""The command line `stepfuse`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stepfuse.scripts import commands

# Without importing torch for --help; a test holds it to RULES.
RULE_NAMES = (
    "base",
    "product",
    "average_noise",
    "kl",
    "switch",
    "systematic",
    "soup",
    "soup_factors",
    "code",
    "rgg",
    "oracle",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a wrong input ends in one line and exit status 1."""
    # Before transformers is imported: on import it warns of torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed.run(parsed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """`benchmark rewards` and `benchmark training` are commands of their own: after `benchmark` a set may come too."""
    if list(arguments[:2]) in (["benchmark", "rewards"], ["benchmark", "training"]):
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    return _parser().parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepfuse",
        description="Fuse diffusion adapters, one a reward, while denoising, for any weights. "
        "Adapters are trained by `accelerate launch train/dpo.py` and `train/ddpo.py`.",
    )
    actions = parser.add_subparsers(required=True, metavar="command")
    _add_demo(actions)
    _add_set(actions)
    _add_sample(actions)
    _add_evaluate(actions)
    _add_build(actions)
    _add_reward(actions)
    _add_benchmark(actions)
    _add_reward_benchmark(actions)
    _add_training_benchmark(actions)
    return parser


def _add(actions: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return actions.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="by default cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the base")


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance", choices=("shared", "full", "off"), help="by default the set's")
    parser.add_argument("--guidance_scale", type=float, help="by default the set's")


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, help="pixels; by default the base's")
    parser.add_argument("--width", type=int, help="pixels; by default the base's")


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", type=Path, default=Path(default), help=f"the file (default {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def _add_demo(actions: argparse._SubParsersAction) -> None:
    demo = _add(
        actions,
        "demo",
        "train two adapters on the embedded emoji base, fuse them, and show the slider and the front between them",
        "stepfuse demo --output_dir outputs/demo",
    )
    demo.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where everything goes")
    demo.add_argument("--overwrite", action="store_true", help="delete what is there")
    demo.add_argument("--seed", type=int, default=0, help="of training and of sampling")
    demo.add_argument("--quick", action="store_true", help="a little of everything: shows the way, not the gain")
    demo.set_defaults(run=commands.demo)


def _add_set(actions: argparse._SubParsersAction) -> None:
    parent = _add(actions, "set", "create, validate and show adapter sets", "stepfuse set show outputs/set")
    own = parent.add_subparsers(required=True, metavar="action")
    create = _add(
        own,
        "create",
        "gather trained adapters of one base into a set",
        "stepfuse set create outputs/set --adapter outputs/alignment --adapter outputs/compressibility",
    )
    create.add_argument("output", type=Path, help="the set's folder")
    create.add_argument(
        "--adapter", type=Path, action="append", required=True, metavar="DIR", help="an adapter folder; repeat"
    )
    create.add_argument(
        "--oracle",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="an adapter trained on a weighted: sum of the rewards, to compare fusion with; repeat",
    )
    create.add_argument(
        "--reference_eta", type=float, default=1.0, help="eta of the base, which counts where the strength is not 1"
    )
    create.add_argument("--half", action="store_true", help="store the weights in float16, half the size")
    create.add_argument("--overwrite", action="store_true", help="replace what is there")
    create.set_defaults(run=commands.set_create)
    validate = _add(
        own,
        "validate",
        "check every file of a set, and with --load that it fits its base",
        "stepfuse set validate outputs/set",
    )
    validate.add_argument("set", type=Path, help="the set's folder")
    validate.add_argument("--load", action="store_true", help="load the base and every adapter too")
    validate.set_defaults(run=commands.set_validate)
    show = _add(own, "show", "print what a set holds", "stepfuse set show outputs/set")
    show.add_argument("set", type=Path, help="the set's folder")
    show.set_defaults(run=commands.set_show)
    profile = _add(
        own,
        "profile",
        "measure at each step how far one soup is from the product, for sample --gate; kept in the set",
        "stepfuse set profile outputs/set --prompts prompts.txt",
    )
    profile.add_argument("set", type=Path, help="the set's folder")
    profile.add_argument(
        "--prompts",
        help="a text file with a prompt a line, or a prompt set such as partiprompts:32; by default "
        "colours-heldout:16, or emoji-heldout:16 for the embedded base",
    )
    profile.add_argument("--steps", type=int, help="denoising steps; by default the set's")
    _add_guidance(profile)
    profile.add_argument("--seed", type=int, default=0)
    profile.add_argument("--batch_size", type=int, default=8, help="images denoised together (default 8)")
    _add_device(profile)
    profile.set_defaults(run=commands.set_profile)


def _add_sample(actions: argparse._SubParsersAction) -> None:
    sample = _add(
        actions,
        "sample",
        "draw images from a set, for any weights; several weights or prompts make a labelled grid",
        'stepfuse sample outputs/set --weights alignment=0.7,compressibility=0.3 --prompt "a fox on a blue background"',
    )
    sample.add_argument("set", type=Path, help="the set's folder")
    sample.add_argument(
        "--weights",
        action="append",
        metavar="A=0.7,B=0.3",
        help="weights by objective, normalised to sum 1; A=0.9@0-0.5,0.2@0.5-1 changes over the steps; repeat for a "
        "column each; by default the set's own",
    )
    sample.add_argument("--prompt", action="append", required=True, help="repeat for a row each")
    sample.add_argument("--negative_prompt", default="", help="what guidance steers away from")
    sample.add_argument(
        "--strength", type=float, default=1.0, help="0: the base, 1: as trained, beyond 1: extrapolated (default 1)"
    )
    sample.add_argument(
        "--weights_on",
        choices=("exponents", "rewards"),
        default="exponents",
        help="what weights multiply: the policies' log-densities, or, by each adapter's beta, the rewards",
    )
    sample.add_argument("--steps", type=int, help="denoising steps; by default the set's")
    sample.add_argument("--seed", type=int, default=0, help="one row, one seed: columns differ by their weights alone")
    sample.add_argument("--rule", default="product", help=f"one of {', '.join(RULE_NAMES)} (default product)")
    sample.add_argument("--candidates", type=int, help="of the rule code: candidates a block (default 20)")
    sample.add_argument("--block_size", type=int, help="of the rule code: steps a block (default 5)")
    sample.add_argument(
        "--gate",
        type=float,
        metavar="TAU",
        help="of the rule product: one soup at steps where `set profile` measured at most TAU nats between the two",
    )
    _add_guidance(sample)
    sample.add_argument(
        "--guidance_interval",
        default="0-1",
        metavar="0.2-0.8",
        help="guide within these shares of the steps only (default 0-1)",
    )
    sample.add_argument(
        "--forwards",
        choices=("batched", "separate"),
        default="batched",
        help="all adapters in one forward, or each in its own (default batched)",
    )
    sample.add_argument("--rows_at_once", type=int, help="most rows in one forward: slower, and less memory")
    sample.add_argument("--compile", choices=("regional", "full"), help="compile transformer blocks, or the UNet")
    _add_size(sample)
    sample.add_argument("--batch_size", type=int, default=8, help="images denoised together (default 8)")
    _add_device(sample)
    _add_output(sample, "out.png")
    sample.set_defaults(run=commands.sample)


def _add_evaluate(actions: argparse._SubParsersAction) -> None:
    evaluate = _add(
        actions,
        "evaluate",
        "measure fusion rules and baselines on one set, on the same prompts and seeds: tables, fronts, a page",
        "stepfuse evaluate emoji --config configs/eval/emoji.yaml --output_dir outputs/evaluation",
    )
    evaluate.add_argument("set", type=Path, nargs="?", help="the set's folder, or emoji: the one that is embedded")
    evaluate.add_argument("--config", type=Path, help="what to draw and measure")
    evaluate.add_argument("--world", choices=("gmm",), help="instead of a set: a world whose optima are known exactly")
    evaluate.add_argument("--seed", type=int, default=0, help="of the world; a config has its own")
    evaluate.add_argument(
        "--output_dir", type=Path, default=Path("outputs/evaluation"), help="where everything goes; run again to go on"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="begin anew")
    _add_device(evaluate)
    evaluate.set_defaults(run=commands.evaluate)


def _add_build(actions: argparse._SubParsersAction) -> None:
    build = _add(
        actions,
        "build",
        "train every objective of a set, create it, profile and evaluate it and write its card; run again to go on",
        "stepfuse build configs/sets/emoji.yaml",
    )
    build.add_argument("config", type=Path, help="what to build")
    build.add_argument("--device", default=None, help="of profile and evaluation; by default cuda where there is one")
    build.set_defaults(run=commands.build)


def _add_reward(actions: argparse._SubParsersAction) -> None:
    parent = _add(actions, "reward", "list rewards, score images with one, serve one", "stepfuse reward list")
    own = parent.add_subparsers(required=True, metavar="action")
    listing = _add(
        own,
        "list",
        "what each reward is, weighs and needs, and whether a gradient can be had of it",
        "stepfuse reward list",
    )
    listing.set_defaults(run=commands.reward_list)
    name = "a reward's name, NAME:FOLDER, path/to/file.py:function, path/to/file.yaml, or http://HOST:PORT"
    score = _add(
        own,
        "score",
        "score a folder of images and write a table",
        "stepfuse reward score image_reward --images outputs/images --prompts prompts.txt --output scores.csv",
    )
    score.add_argument("name", help=name)
    score.add_argument("--images", type=Path, required=True, metavar="DIR")
    score.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="a prompt a line in the order of the images' names, or one for all; or a .csv or .jsonl with file_name "
        "and prompt",
    )
    score.add_argument("--batch_size", type=int, default=16, help="images scored together (default 16)")
    score.add_argument("--picture", type=Path, metavar="FILE", help="the best images with their scores, as one picture")
    score.add_argument("--device", default=None, help="by default cuda where there is one")
    _add_output(score, "scores.csv")
    score.set_defaults(run=commands.reward_score)
    serve = _add(
        own,
        "serve",
        "serve a reward over HTTP, for --reward http://HOST:PORT elsewhere",
        "stepfuse reward serve image_reward --port 8765",
    )
    serve.add_argument("name", help=name)
    serve.add_argument("--host", default="127.0.0.1", help="where it listens (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8765, help="(default 8765)")
    serve.add_argument(
        "--token_file",
        type=Path,
        help="a file with the token that clients must send; by default STEPFUSE_REWARD_TOKEN, or one made up and shown",
    )
    serve.add_argument("--device", default=None, help="by default cuda where there is one")
    serve.set_defaults(run=commands.reward_serve)


def _add_reward_benchmark(actions: argparse._SubParsersAction) -> None:
    benchmark = _add(
        actions,
        "benchmark rewards",
        "time rewards against the packages they come from, in turns, with random weights, and compare their scores",
        "stepfuse benchmark rewards --rewards image_reward --output rewards.json",
    )
    benchmark.add_argument(
        "--rewards", type=_names, default=("image_reward", "hpsv2", "pickscore"), metavar="A,B", help="(default all)"
    )
    benchmark.add_argument("--images", type=Path, metavar="DIR", help="by default pictures made up")
    benchmark.add_argument("--prompts", type=Path, metavar="FILE", help="as `reward score` takes it")
    benchmark.add_argument("--count", type=int, default=16, help="images (default 16)")
    benchmark.add_argument("--batch_size", type=int, default=16, help="of ours (default 16)")
    benchmark.add_argument("--repeats", type=int, default=3, help="rounds; their median counts (default 3)")
    benchmark.add_argument(
        "--size", choices=("published", "small"), default="published", help="of the models; small ones have two layers"
    )
    benchmark.add_argument("--threads", type=int, help="of the CPU, theirs and ours; by default as many as torch takes")
    _add_output(benchmark, "rewards.json")
    benchmark.set_defaults(run=commands.reward_benchmark)


def _add_benchmark(actions: argparse._SubParsersAction) -> None:
    benchmark = _add(
        actions,
        "benchmark",
        "time fused sampling and its rivals in turns, as ratios to one adapter with guidance",
        "stepfuse benchmark emoji --output bench.json",
    )
    benchmark.add_argument("set", nargs="?", help="measure on this set's base, with LoRAs like its first")
    benchmark.add_argument("--architecture", choices=("sd15", "sdxl"), help="instead of a set: random weights")
    benchmark.add_argument("--adapters", type=_numbers, default=(1, 2, 4, 8), metavar="1,2,4,8")
    benchmark.add_argument("--rules", type=_names, default=("product", "systematic", "soup"), metavar="A,B")
    benchmark.add_argument(
        "--rivals",
        type=_names,
        default=("separate", "diffusion_blend", "set_adapters", "mixed_batch"),
        metavar="A,B",
        help="of separate, diffusion_blend, set_adapters, mixed_batch, or '' (default all)",
    )
    benchmark.add_argument("--images", type=int, default=8, help="a batch (default 8)")
    _add_size(benchmark)
    benchmark.add_argument("--steps", type=int, default=10, help="denoising steps of a measurement (default 10)")
    benchmark.add_argument("--repeats", type=int, default=5, help="rounds; their median counts (default 5)")
    benchmark.add_argument("--guidance_scale", type=float, default=5.0, help="(default 5)")
    benchmark.add_argument("--rows_at_once", type=int, help="most rows in one forward of ours")
    benchmark.add_argument("--compile", choices=("regional", "full"), default="", help="ours, the reference included")
    benchmark.add_argument("--mode", default="", help="of torch.compile: reduce-overhead takes CUDA graphs")
    benchmark.add_argument("--no_memory", action="store_true", help="leave memory out: each row's takes a process")
    benchmark.add_argument("--threads", type=int, help="of the CPU; by default as many as torch takes")
    _add_device(benchmark)
    _add_output(benchmark, "bench.json")
    benchmark.set_defaults(run=commands.benchmark)


def _add_training_benchmark(actions: argparse._SubParsersAction) -> None:
    benchmark = _add(
        actions,
        "benchmark training",
        "time a whole optimiser step, rollout and update, beside ddpo-pytorch's and SPO's loops, in turns",
        "stepfuse benchmark training --model emoji --timestep_fraction 0.5 --output training.json",
    )
    benchmark.add_argument("--model", default="emoji", help="emoji, or sd15 or sdxl: random weights (default emoji)")
    benchmark.add_argument("--algorithms", type=_names, default=("ddpo", "dpo"), metavar="A,B", help="(default both)")
    benchmark.add_argument("--images", type=int, default=8, help="of a step (default 8)")
    benchmark.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    benchmark.add_argument("--candidates", type=int, default=4, help="of dpo and SPO (default 4)")
    benchmark.add_argument("--resolution", type=int, help="pixels; by default the model's")
    benchmark.add_argument("--repeats", type=int, default=3, help="rounds, after one to warm up (default 3)")
    benchmark.add_argument(
        "--timestep_fraction", type=float, default=1.0, help="another row that learns from this share of the steps"
    )
    benchmark.add_argument(
        "--timesteps_per_forward", type=int, default=1, help="further rows with so many steps in a forward of the loss"
    )
    benchmark.add_argument(
        "--compile", choices=("no", "regional", "full"), default="no", help="another row of ours, compiled"
    )
    benchmark.add_argument("--gradient_checkpointing", action="store_true", help="in all ways")
    benchmark.add_argument("--no_memory", action="store_true", help="leave memory out: each row's takes a process")
    benchmark.add_argument("--threads", type=int, help="of the CPU; by default as many as torch takes")
    _add_device(benchmark)
    _add_output(benchmark, "training.json")
    benchmark.set_defaults(run=commands.training_benchmark)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers such as 1,2,4,8") from None


if __name__ == "__main__":
    main()
