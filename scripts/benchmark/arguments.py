"""Arguments of the benchmarks."""

import argparse
from pathlib import Path

from stepfuse.scripts import commands
from stepfuse.scripts.arguments import add_command, add_device, add_output, add_size, names, numbers


def add_reward_benchmark(actions: argparse._SubParsersAction) -> None:
    """`benchmark rewards`."""
    benchmark = add_command(
        actions,
        "benchmark rewards",
        "time rewards against the packages they come from, in turns, with random weights, and compare their scores",
        "stepfuse benchmark rewards --rewards image_reward --output rewards.json",
    )
    benchmark.add_argument(
        "--rewards", type=names, default=("image_reward", "hpsv2", "pickscore"), metavar="A,B", help="(default all)"
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
    add_output(benchmark, "rewards.json")
    benchmark.set_defaults(run=commands.reward_benchmark)


def add_benchmark(actions: argparse._SubParsersAction) -> None:
    """`benchmark`, of sampling."""
    benchmark = add_command(
        actions,
        "benchmark",
        "time fused sampling and its rivals in turns, as ratios to one adapter with guidance",
        "stepfuse benchmark emoji --output bench.json",
    )
    benchmark.add_argument("set", nargs="?", help="measure on this set's base, with LoRAs like its first")
    benchmark.add_argument("--architecture", choices=("sd15", "sdxl"), help="instead of a set: random weights")
    benchmark.add_argument("--adapters", type=numbers, default=(1, 2, 4, 8), metavar="1,2,4,8")
    benchmark.add_argument("--rules", type=names, default=("product", "systematic", "soup"), metavar="A,B")
    benchmark.add_argument(
        "--rivals",
        type=names,
        default=("separate", "diffusion_blend", "set_adapters", "mixed_batch"),
        metavar="A,B",
        help="of separate, diffusion_blend, set_adapters, mixed_batch, or '' (default all)",
    )
    benchmark.add_argument("--images", type=int, default=8, help="a batch (default 8)")
    add_size(benchmark)
    benchmark.add_argument("--steps", type=int, default=10, help="denoising steps of a measurement (default 10)")
    benchmark.add_argument("--repeats", type=int, default=5, help="rounds; their median counts (default 5)")
    benchmark.add_argument("--guidance_scale", type=float, default=5.0, help="(default 5)")
    benchmark.add_argument("--rows_at_once", type=int, help="most rows in one forward of ours")
    benchmark.add_argument("--compile", choices=("regional", "full"), default="", help="ours, the reference included")
    benchmark.add_argument("--mode", default="", help="of torch.compile: reduce-overhead takes CUDA graphs")
    _add_run(benchmark)
    add_output(benchmark, "bench.json")
    benchmark.set_defaults(run=commands.benchmark)


def add_training_benchmark(actions: argparse._SubParsersAction) -> None:
    """`benchmark training`."""
    benchmark = add_command(
        actions,
        "benchmark training",
        "time a whole optimiser step, rollout and update, beside ddpo-pytorch's and SPO's loops, in turns",
        "stepfuse benchmark training --model emoji --timestep_fraction 0.5 --output training.json",
    )
    benchmark.add_argument("--model", default="emoji", help="emoji, or sd15 or sdxl: random weights (default emoji)")
    benchmark.add_argument("--algorithms", type=names, default=("ddpo", "dpo"), metavar="A,B", help="(default both)")
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
    _add_run(benchmark)
    add_output(benchmark, "training.json")
    benchmark.set_defaults(run=commands.training_benchmark)


def _add_run(benchmark: argparse.ArgumentParser) -> None:
    """How rows are measured."""
    benchmark.add_argument("--no_memory", action="store_true", help="leave memory out: each row's takes a process")
    benchmark.add_argument("--threads", type=int, help="of the CPU; by default as many as torch takes")
    add_device(benchmark)
