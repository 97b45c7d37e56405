"""Arguments of the benchmarks."""

import argparse
from pathlib import Path

from stepfuse.scripts.cli import commands, completion
from stepfuse.scripts.cli.arguments import (
    Container,
    add_command,
    add_device,
    add_output,
    add_set,
    add_size,
    names,
    number,
    numbers,
    whole,
)
from stepfuse.scripts.cli.choices import ALGORITHMS, BASELINES, ORIGINAL_REWARDS

RULES = ("product", "systematic", "soup")
JSON = "JSON file for the results"


def add_reward_benchmark(actions: argparse._SubParsersAction) -> None:
    """`benchmark rewards`."""
    benchmark = add_command(
        actions,
        "benchmark rewards",
        "time rewards against the packages they come from, and compare their scores",
        "stepfuse benchmark rewards --rewards image_reward --output rewards.json",
        "Both have the same random weights. Each package runs in an environment of its own, of several GB, which is "
        "made at first use.",
    )
    rewards = benchmark.add_argument(
        "--rewards",
        type=names,
        default=ORIGINAL_REWARDS,
        metavar="A,B",
        help=f"Rewards to time (default: {','.join(ORIGINAL_REWARDS)}).",
    )
    completion.complete(rewards, completion.original_rewards)
    benchmark.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="Folder of images to score; it needs --prompts (default: generated images).",
    )
    benchmark.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="Prompts of the images, in the format of `stepfuse reward score --prompts` (default: generated prompts).",
    )
    _add_count(benchmark, "--count", 16, "Number of images")
    _add_count(benchmark, "--batch_size", 16, "Images that stepfuse scores at once; the packages score one at a time")
    _add_count(benchmark, "--repeats", 3, "Rounds of measurements, of which the median counts")
    benchmark.add_argument(
        "--size",
        choices=("published", "small"),
        default="published",
        help="Size of the models: published, or small with two layers for a quick trial (default: %(default)s).",
    )
    _add_threads(benchmark)
    add_output(benchmark, "rewards.json", JSON)
    benchmark.set_defaults(run=commands.reward_benchmark)


def add_benchmark(actions: argparse._SubParsersAction) -> None:
    """`benchmark`, of sampling."""
    benchmark = add_command(
        actions,
        "benchmark",
        "time fused sampling and other methods, as multiples of one adapter with guidance",
        "stepfuse benchmark emoji --output bench.json",
        "Give a set, or --architecture for random weights.",
    )
    add_set(
        benchmark,
        nargs="?",
        text="Adapter set whose base model is timed, with random LoRAs of the layout of its first adapter.",
    )
    model = benchmark.add_argument_group("what to measure")
    model.add_argument(
        "--architecture",
        choices=("sd15", "sdxl"),
        help="Architecture with random weights in place of a set: Stable Diffusion 1.5 or XL (default: the set's base "
        "model).",
    )
    model.add_argument(
        "--adapters",
        type=numbers,
        default=(1, 2, 4, 8),
        metavar="1,2,4,8",
        help="Numbers of adapters to fuse; each rule and baseline is timed with each of them (default: 1,2,4,8).",
    )
    rules = model.add_argument(
        "--rules",
        type=names,
        default=RULES,
        metavar="A,B",
        help=f"Fusion rules to time (default: {','.join(RULES)}).",
    )
    completion.complete(rules, completion.benchmark_rules)
    baselines = model.add_argument(
        "--baselines",
        "--rivals",
        type=names,
        default=BASELINES,
        metavar="A,B",
        help="Baselines to time, or '' for none. separate: the product with one forward pass "
        "per adapter; diffusion_blend: one whole UNet per adapter; set_adapters: diffusers' set_adapters before each "
        f"forward pass; mixed_batch: peft's adapter_names (default: {','.join(BASELINES)}).",
    )
    completion.complete(baselines, completion.baselines)
    _add_count(model, "--images", 8, "Images denoised at once")
    add_size(model)
    _add_count(model, "--steps", 10, "Denoising steps of one measurement")
    model.add_argument(
        "--guidance_scale",
        type=number,
        default=5.0,
        metavar="G",
        help="Scale of classifier-free guidance, anything but 1 (default: %(default)s).",
    )
    run = benchmark.add_argument_group("how to run")
    _add_count(run, "--repeats", 5, "Rounds of measurements, of which the median counts")
    run.add_argument(
        "--rows_at_once",
        type=whole,
        metavar="N",
        help="Largest batch of one forward pass of stepfuse, in rows: one row per image and adapter, and one per image "
        "for guidance (default: all at once).",
    )
    run.add_argument(
        "--compile",
        choices=("regional", "full"),
        default="",
        help="Compile the UNet of stepfuse and of the reference with torch.compile. regional: each transformer block; "
        "full: the whole UNet. The baselines are not compiled (default: no compilation).",
    )
    mode = run.add_argument(
        "--mode",
        default="",
        metavar="NAME",
        help="Mode of torch.compile, such as reduce-overhead for CUDA graphs; it needs --compile (default: torch's "
        "default mode).",
    )
    completion.complete(mode, completion.compile_modes)
    _add_run(run)
    add_output(benchmark.add_argument_group("output"), "bench.json", JSON)
    benchmark.set_defaults(run=commands.benchmark)


def add_training_benchmark(actions: argparse._SubParsersAction) -> None:
    """`benchmark training`."""
    benchmark = add_command(
        actions,
        "benchmark training",
        "time one optimiser step, sampling and update, against the loops of ddpo-pytorch and SPO",
        "stepfuse benchmark training --model emoji --timestep_fraction 0.5 --output training.json",
    )
    model = benchmark.add_argument_group("what to measure")
    chosen = model.add_argument(
        "--model",
        default="emoji",
        metavar="NAME",
        help="Base model: emoji, or sd15 or sdxl with random weights (default: %(default)s).",
    )
    completion.complete(chosen, completion.models)
    algorithms = model.add_argument(
        "--algorithms",
        type=names,
        default=ALGORITHMS,
        metavar="A,B",
        help="Algorithms to time: ddpo against ddpo-pytorch, dpo against SPO (default: ddpo,dpo).",
    )
    completion.complete(algorithms, completion.several(ALGORITHMS))
    _add_count(model, "--images", 8, "Images of one optimiser step")
    _add_count(model, "--steps", 20, "Denoising steps")
    _add_count(model, "--candidates", 4, "Candidates of each step of dpo and SPO, 2 or more")
    model.add_argument(
        "--resolution",
        type=whole,
        metavar="PIXELS",
        help="Height and width of the images in pixels, such as 512 (default: that of the model).",
    )
    model.add_argument(
        "--timestep_fraction",
        type=number,
        default=1.0,
        metavar="SHARE",
        help="Below 1, add rows that train on this share of the denoising steps, such as 0.5 (default: %(default)s).",
    )
    _add_count(
        model,
        "--timesteps_per_forward",
        1,
        "Above 1, add rows that compute the loss of this many denoising steps in one forward pass",
    )
    model.add_argument(
        "--compile",
        choices=("no", "regional", "full"),
        default="no",
        help="Add rows of stepfuse with torch.compile. regional: each transformer block; full: the whole UNet "
        "(default: %(default)s).",
    )
    model.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Recompute activations in the backward pass, in all rows (default: keep them).",
    )
    run = benchmark.add_argument_group("how to run")
    _add_count(run, "--repeats", 3, "Rounds of measurements after one to warm up, of which the median counts")
    _add_run(run)
    add_output(benchmark.add_argument_group("output"), "training.json", JSON)
    benchmark.set_defaults(run=commands.training_benchmark)


def _add_count(parser: Container, flag: str, default: int, text: str) -> None:
    parser.add_argument(flag, type=whole, default=default, metavar="N", help=f"{text} (default: %(default)s).")


def _add_run(parser: Container) -> None:
    """How rows are measured."""
    parser.add_argument(
        "--no_memory",
        action="store_true",
        help="Do not measure peak memory, which starts a process for each row (default: measure it).",
    )
    _add_threads(parser)
    add_device(parser, dtype="the models")


def _add_threads(parser: Container) -> None:
    parser.add_argument(
        "--threads", type=whole, metavar="N", help="Number of CPU threads (default: as many as torch chooses)."
    )
