# PYTHON_ARGCOMPLETE_OK
"""The command line `stepfuse`. Nothing here imports torch: `--help`, completion and refusals answer at once."""

import argparse
import importlib.metadata
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from stepfuse.data.text_files import print_any_text, printable
from stepfuse.scripts.cli import commands, completion
from stepfuse.scripts.cli.arguments import (
    Parser,
    add_command,
    add_device,
    add_device_alone,
    add_guidance,
    add_output,
    add_overwrite,
    add_set,
    add_size,
    add_trust,
    number,
    whole,
)
from stepfuse.scripts.cli.benchmark_arguments import add_benchmark, add_reward_benchmark, add_training_benchmark
from stepfuse.scripts.cli.checks import check_numbers
from stepfuse.scripts.cli.choices import RULE_NAMES
from stepfuse.scripts.cli.set_arguments import add_hub, add_set_commands


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
        check_numbers(parsed)
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.exit(141)  # 128 + SIGPIPE, as of a command that the signal ends
    except ValueError as error:
        sys.exit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        print(f"\ninterrupted{_how_to_continue(parsed)}", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as of a command that the signal ends


def _output_is_closed() -> bool:
    """Whether the reader of standard output has ended, as `head` does; what is left to print is then dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
    return True


def _how_to_continue(parsed: argparse.Namespace) -> str:
    """What to do after Ctrl-C, for commands that keep what they have done."""
    if not getattr(parsed, "continued", False) or getattr(parsed, "world", None):
        return ""
    anew = getattr(parsed, "overwrite", False) and hasattr(parsed, "output_dir")  # their folder is cleared
    return f"; the same command{' without --overwrite' if anew else ''} continues it"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; its function is the attribute `run`."""
    parser = _parser()
    completion.autocomplete(parser)
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    return parser.parse_args(arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="stepfuse",
        description="Fuse diffusion adapters, one per reward, while denoising, for any weights.\n"
        "Adapters are trained by `accelerate launch -m stepfuse.train.dpo` and `stepfuse.train.ddpo`.",
        epilog="first command:\n"
        '  stepfuse sample emoji --prompt "a fox on a green background" --output fox.png\n'
        'shell completion:\n  eval "$(register-python-argcomplete stepfuse)"',
    )
    version = importlib.metadata.version("stepfuse")
    parser.add_argument("--version", action="version", version=f"stepfuse {version}", help="Print the version.")
    actions = parser.add_subparsers(required=True, metavar="command", title="commands", parser_class=Parser)
    _add_demo(actions)
    add_set_commands(actions)
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
        "train two adapters on the embedded emoji base, fuse them, and plot the trade-off between the rewards",
        "stepfuse demo --output_dir outputs/demo",
        "It takes about 8 minutes on two CPU cores and needs no GPU and no download. An interrupted demo is continued "
        "by the same command.",
    )
    demo.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("outputs/demo"),
        help="Output folder for the two adapters, the set of both, the pictures slider.png and front.png, and "
        "results.json (default: %(default)s).",
    )
    add_overwrite(demo, "the demo in the output folder", folder=True)
    demo.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="Random seed of training and of sampling (default: %(default)s).",
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="Train for one step and measure on 8 prompts, to see that everything runs; the rewards are not expected "
        "to improve (default: the full demo).",
    )
    demo.set_defaults(run=commands.demo, continued=True)


def _add_sample(actions: argparse._SubParsersAction) -> None:
    sample = add_command(
        actions,
        "sample",
        "generate images with a set, for any weights of its objectives",
        'stepfuse sample emoji --weights alignment=0.7,compressibility=0.3 --prompt "a fox on a blue background"',
        "Several weights or prompts make a labelled grid.",
    )
    add_set(sample)
    images = sample.add_argument_group("what to generate")
    images.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="Prompt; required, repeat for more rows."
    )
    images.add_argument(
        "--negative_prompt",
        metavar="TEXT",
        help="What guidance steers away from (default: none, for which diffusers takes an empty prompt, and zeros for "
        "Stable Diffusion XL models that ask for them).",
    )
    weights = images.add_argument(
        "--weights",
        action="append",
        metavar="A=0.7,B=0.3",
        help="Weight of each objective, normalised to sum to 1; repeat for more columns. A=0.9@0-0.5,0.2@0.5-1 changes "
        "it over the denoising steps, here at half of them (default: the set's default weights).",
    )
    completion.complete(weights, completion.weights)
    images.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="Random seed of the first row, 0 to 2^64 - 1; each further row adds 1, and the columns of a row share "
        "theirs (default: %(default)s).",
    )
    images.add_argument(
        "--steps", type=whole, metavar="N", help="Number of denoising steps, such as 25 (default: that of the set)."
    )
    add_size(images)
    fusion = sample.add_argument_group("fusion")
    rule = fusion.add_argument(
        "--rule", metavar="NAME", help=f"Fusion rule, one of {', '.join(RULE_NAMES)} (default: that of the set)."
    )
    completion.complete(rule, completion.rules)
    fusion.add_argument(
        "--strength",
        type=number,
        default=1.0,
        metavar="S",
        help="0 is the base model, 1 the strength that the adapters were trained with, and more extrapolates "
        "(default: %(default)s).",
    )
    fusion.add_argument(
        "--weights_on",
        choices=("exponents", "rewards"),
        default="exponents",
        help="What the weights multiply. exponents: the log-densities of the adapters, so that equal weights mean "
        "equally much of each adapter; rewards: the rewards, which also takes into account the KL coefficient beta "
        "that each adapter was trained with (default: %(default)s).",
    )
    fusion.add_argument(
        "--gate",
        type=number,
        metavar="NATS",
        help="For the rule product: at steps where the soup is at most this KL divergence from the product, run one "
        "merged network in place of all adapters, such as 0.4. It needs a set measured by `stepfuse set profile` "
        "(default: run all adapters at every step).",
    )
    fusion.add_argument(
        "--candidates", type=whole, metavar="N", help="For the rule code: candidates of each block (default: 20)."
    )
    fusion.add_argument(
        "--block_size", type=whole, metavar="N", help="For the rule code: denoising steps of a block (default: 5)."
    )
    add_trust(fusion)
    guidance = sample.add_argument_group("guidance")
    add_guidance(guidance)
    guidance.add_argument(
        "--guidance_interval",
        default="0-1",
        metavar="BEGIN-END",
        help="Part of the denoising steps that is guided, as shares from 0, the first step, to 1, the end, such as "
        "0.2-0.8; the other steps cost less (default: %(default)s).",
    )
    speed = sample.add_argument_group("speed and memory")
    speed.add_argument(
        "--batch_size", type=whole, default=8, metavar="N", help="Images denoised at once (default: %(default)s)."
    )
    speed.add_argument(
        "--forwards",
        choices=("batched", "separate"),
        default="batched",
        help="batched: one forward pass for all adapters; separate: one forward pass per adapter, which is slower and "
        "takes any kind of LoRA (default: %(default)s).",
    )
    speed.add_argument(
        "--rows_at_once",
        type=whole,
        metavar="N",
        help="Largest batch of one forward pass, in rows: one row per image and adapter, and one per image for "
        "guidance. Fewer take less memory and more time, such as 4 (default: all at once).",
    )
    speed.add_argument(
        "--compile",
        choices=("regional", "full"),
        help="Compile the UNet with torch.compile. regional: each transformer block; full: the whole UNet (default: no "
        "compilation).",
    )
    add_device(speed)
    output = sample.add_argument_group("output")
    add_output(output, "out.png", "Picture to write, such as fox.png or fox.jpg")
    output.add_argument(
        "--enlarge",
        type=whole,
        metavar="N",
        help="Write every pixel as a square of N × N pixels with crisp edges, from 1 to 64 (default: 1 for a single "
        "image; in a grid, enough to make images at least 128 pixels wide).",
    )
    sample.set_defaults(run=commands.sample)


def _add_evaluate(actions: argparse._SubParsersAction) -> None:
    evaluate = add_command(
        actions,
        "evaluate",
        "measure fusion rules and baselines of a set on the same prompts and seeds",
        "stepfuse evaluate emoji --config eval/emoji --output_dir outputs/evaluation",
        "It writes tables, plots of the fronts, and a page, report.html. An interrupted evaluation is continued by the "
        "same command.",
    )
    add_set(evaluate, nargs="?")
    what = evaluate.add_argument_group("what to measure")
    config = what.add_argument(
        "--config",
        metavar="FILE_OR_NAME",
        help="YAML file with the prompts, seeds, fusion rules, weights and rewards to measure, or the name of a "
        "packaged one, such as eval/emoji. Required with a set (default with --world: none).",
    )
    completion.complete(config, completion.configs("eval"))
    what.add_argument(
        "--world",
        choices=("gmm",),
        help="Measure the fusion rules on a Gaussian mixture with a known optimum, in place of a set (default: use the "
        "set).",
    )
    what.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="Random seed with --world; a config states its own (default: %(default)s).",
    )
    add_trust(what)
    add_device(evaluate.add_argument_group("speed and memory"))
    output = evaluate.add_argument_group("output")
    output.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("outputs/evaluation"),
        help="Output folder; a folder with an unfinished evaluation of the same set and config is continued (default: "
        "%(default)s).",
    )
    add_overwrite(output, "the evaluation in the output folder", folder=True)
    evaluate.set_defaults(run=commands.evaluate, continued=True)


def _add_build(actions: argparse._SubParsersAction) -> None:
    build = add_command(
        actions,
        "build",
        "train the adapters of a set, create the set, profile and evaluate it, and write its card",
        "stepfuse build sets/emoji",
        "An interrupted build is continued by the same command.",
    )
    config = build.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML file that lists the trainings, the evaluation and the output folder of the set, or the name of a "
        "packaged one: sets/emoji, sets/sd15 or sets/sdxl.",
    )
    completion.complete(config, completion.configs("sets"))
    add_device_alone(build)
    build.set_defaults(run=commands.build, continued=True)


def _add_reward(actions: argparse._SubParsersAction) -> None:
    parent = add_command(actions, "reward", "list rewards, score images with one, serve one", "stepfuse reward list")
    own = parent.add_subparsers(required=True, metavar="action", title="actions")
    listing = add_command(
        own,
        "list",
        "print every reward with its size, its license, and whether it has a gradient",
        "stepfuse reward list",
    )
    listing.set_defaults(run=commands.reward_list)
    name = (
        "Name of a reward, such as image_reward; NAME:FOLDER with its weights; path/to/file.py:function; "
        "path/to/file.yaml; or a server, http://HOST:PORT."
    )
    score = add_command(
        own,
        "score",
        "score a folder of images and write a table",
        "stepfuse reward score image_reward --images outputs/images --prompts prompts.txt --output scores.csv",
        "An interrupted run is continued by the same command.",
    )
    completion.complete(score.add_argument("name", metavar="REWARD", help=name), completion.rewards)
    score.add_argument("--images", type=Path, required=True, metavar="DIR", help="Folder of the images; required.")
    score.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="Text file with one prompt per line, in the order of the image names, or with one line for all images; or "
        "a .csv or .jsonl file with the columns file_name and prompt. Required.",
    )
    score.add_argument(
        "--batch_size", type=whole, default=16, metavar="N", help="Images scored at once (default: %(default)s)."
    )
    add_device_alone(score)
    add_output(score, "scores.csv", "CSV file with the columns file_name, prompt and score")
    score.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="Picture to write of the best images with their scores, such as best.png (default: none).",
    )
    score.set_defaults(run=commands.reward_score, continued=True)
    serve = add_command(
        own,
        "serve",
        "serve a reward over HTTP, for --reward http://HOST:PORT on another machine",
        "stepfuse reward serve image_reward --port 8765",
    )
    completion.complete(serve.add_argument("name", metavar="REWARD", help=name), completion.rewards)
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address to listen on; 0.0.0.0 for all networks (default: %(default)s, this machine only).",
    )
    serve.add_argument(
        "--port",
        type=whole,
        default=8765,
        metavar="N",
        help="Port to listen on, 0 for any free one (default: %(default)s).",
    )
    serve.add_argument(
        "--token_file",
        type=Path,
        metavar="FILE",
        help="File with the token that clients must send (default: the variable STEPFUSE_REWARD_TOKEN, or else a "
        "random one, which is printed).",
    )
    add_device_alone(serve)
    serve.set_defaults(run=commands.reward_serve)


if __name__ == "__main__":
    main()
