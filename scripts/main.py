"""The command line `stepfuse`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stepfuse.data.text_files import print_any_text, printable
from stepfuse.scripts import commands
from stepfuse.scripts.arguments import add_command, add_device, add_guidance, add_output, add_size, add_trust
from stepfuse.scripts.benchmark.arguments import add_benchmark, add_reward_benchmark, add_training_benchmark
from stepfuse.scripts.set_arguments import SET, add_hub, add_set

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
    print_any_text()
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    for name in ("prompt", "negative_prompt"):  # texts, unlike paths, need no bytes that the locale cannot decode
        given = getattr(parsed, name, None)
        if given:
            setattr(parsed, name, printable(given) if isinstance(given, str) else [printable(text) for text in given])
    try:
        parsed.run(parsed)
    except ValueError as error:
        sys.exit(f"error: {printable(error)}")
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
    add_set(actions)
    _add_sample(actions)
    _add_evaluate(actions)
    _add_build(actions)
    add_hub(actions)
    _add_reward(actions)
    add_benchmark(actions)
    add_reward_benchmark(actions)
    add_training_benchmark(actions)
    return parser


def _add_demo(actions: argparse._SubParsersAction) -> None:
    demo = add_command(
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


def _add_sample(actions: argparse._SubParsersAction) -> None:
    sample = add_command(
        actions,
        "sample",
        "draw images from a set, for any weights; several weights or prompts make a labelled grid",
        'stepfuse sample outputs/set --weights alignment=0.7,compressibility=0.3 --prompt "a fox on a blue background"',
    )
    sample.add_argument("set", type=Path, help=SET)
    sample.add_argument(
        "--weights",
        action="append",
        metavar="A=0.7,B=0.3",
        help="weights by objective, normalised to sum 1; A=0.9@0-0.5,0.2@0.5-1 changes over the steps; repeat for a "
        "column each; by default the set's own",
    )
    sample.add_argument("--prompt", action="append", required=True, help="repeat for a row each")
    sample.add_argument(
        "--negative_prompt",
        help='what guidance steers away from; without it, as in diffusers, zeros for most of SDXL and "" for others',
    )
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
    sample.add_argument("--rule", help=f"one of {', '.join(RULE_NAMES)}; by default the set's, which is product")
    sample.add_argument("--candidates", type=int, help="of the rule code: candidates a block (default 20)")
    sample.add_argument("--block_size", type=int, help="of the rule code: steps a block (default 5)")
    sample.add_argument(
        "--gate",
        type=float,
        metavar="TAU",
        help="of the rule product: one soup at steps where `set profile` measured at most TAU nats between the two",
    )
    add_guidance(sample)
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
    add_size(sample)
    sample.add_argument(
        "--enlarge",
        type=int,
        help="write every pixel as a square of this many pixels a side, with crisp edges; by default 1 for a single "
        "image, and what makes images at least 128 pixels wide in a grid",
    )
    sample.add_argument("--batch_size", type=int, default=8, help="images denoised together (default 8)")
    add_trust(sample)
    add_device(sample)
    add_output(sample, "out.png")
    sample.set_defaults(run=commands.sample)


def _add_evaluate(actions: argparse._SubParsersAction) -> None:
    evaluate = add_command(
        actions,
        "evaluate",
        "measure fusion rules and baselines on one set, on the same prompts and seeds: tables, fronts, a page",
        "stepfuse evaluate emoji --config configs/eval/emoji.yaml --output_dir outputs/evaluation",
    )
    evaluate.add_argument("set", type=Path, nargs="?", help=SET)
    evaluate.add_argument("--config", type=Path, help="what to draw and measure")
    evaluate.add_argument("--world", choices=("gmm",), help="instead of a set: a world whose optima are known exactly")
    evaluate.add_argument("--seed", type=int, default=0, help="of the world; a config has its own")
    evaluate.add_argument(
        "--output_dir", type=Path, default=Path("outputs/evaluation"), help="where everything goes; run again to go on"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="begin anew")
    add_trust(evaluate)
    add_device(evaluate)
    evaluate.set_defaults(run=commands.evaluate)


def _add_build(actions: argparse._SubParsersAction) -> None:
    build = add_command(
        actions,
        "build",
        "train every objective of a set, create it, profile and evaluate it and write its card; run again to go on",
        "stepfuse build configs/sets/emoji.yaml",
    )
    build.add_argument("config", type=Path, help="what to build")
    build.add_argument("--device", default=None, help="of profile and evaluation; by default cuda where there is one")
    build.set_defaults(run=commands.build)


def _add_reward(actions: argparse._SubParsersAction) -> None:
    parent = add_command(actions, "reward", "list rewards, score images with one, serve one", "stepfuse reward list")
    own = parent.add_subparsers(required=True, metavar="action")
    listing = add_command(
        own,
        "list",
        "what each reward is, weighs and needs, and whether a gradient can be had of it",
        "stepfuse reward list",
    )
    listing.set_defaults(run=commands.reward_list)
    name = "a reward's name, NAME:FOLDER, path/to/file.py:function, path/to/file.yaml, or http://HOST:PORT"
    score = add_command(
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
    add_output(score, "scores.csv")
    score.set_defaults(run=commands.reward_score)
    serve = add_command(
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


if __name__ == "__main__":
    main()
