"""What the commands of `stepfuse` do; heavy imports wait until one is run."""

import argparse
import sys

from stepfuse.data.output_folder import check_output, written_file
from stepfuse.data.settings_file import find_config
from stepfuse.scripts.cli.checks import (
    check_device_name,
    check_file,
    check_folder,
    check_interval,
    check_names,
    check_picture,
    check_reward,
    check_rule,
    check_set,
    check_texts,
    check_weights,
)
from stepfuse.scripts.cli.choices import ALGORITHMS, BASELINES, BENCHMARK_RULES, COMPILE_MODES, MODELS, ORIGINAL_REWARDS


def demo(arguments: argparse.Namespace) -> None:
    from stepfuse.scripts.recipes.demo import demo

    demo(arguments.output_dir, seed=arguments.seed, overwrite=arguments.overwrite, quick=arguments.quick)


def sample(arguments: argparse.Namespace) -> None:
    check_picture(arguments.output, overwrite=arguments.overwrite)
    check_texts(arguments.prompt)
    check_device_name(arguments.device)
    options = {name: getattr(arguments, name) for name in ("candidates", "block_size", "gate")}
    options = {name: value for name, value in options.items() if value is not None}
    check_rule(arguments.rule, options)
    interval = check_interval(arguments.guidance_interval)
    if arguments.compile and arguments.forwards == "separate":
        raise ValueError("--compile needs --forwards batched: separate forwards would compile once for each adapter")
    columns = check_weights(arguments.weights or [], check_set(arguments.set))

    import torch

    from stepfuse.data.lettering import enlargement
    from stepfuse.data.seeds import numbered_generator
    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.fuse.rules.registry import get_rule
    from stepfuse.fuse.sampling.pictures import sampled_picture
    from stepfuse.fuse.sampling.sampler import FusedSampler
    from stepfuse.fuse.sets.adapter_set import load_set

    device = check_device(arguments.device)
    rule = get_rule(arguments.rule, **options) if arguments.rule else None
    quiet_libraries()
    loaded = load_set(arguments.set)
    if rule is None:
        rule = get_rule(loaded.default_rule, **options)
    if not columns:
        columns = [loaded.default_weights]
    sampler = FusedSampler.from_pretrained(
        loaded,
        rule=rule,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        forwards=arguments.forwards,
        rows_at_once=arguments.rows_at_once,
        trust_rewards=arguments.trust_rewards,
        dtype=getattr(torch, arguments.dtype),
        device=device,
    )
    if arguments.compile:
        sampler.compile(arguments.compile)
    prompts = [prompt for prompt in arguments.prompt for _ in columns]
    rows = [row for row in range(len(arguments.prompt)) for _ in columns]
    images = sampler.sample(
        prompts,
        columns * len(arguments.prompt),
        strength=arguments.strength,
        weights_on=arguments.weights_on,
        num_inference_steps=arguments.steps,
        guidance_interval=interval,
        generator=[numbered_generator(arguments.seed, row) for row in rows],
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        batch_size=arguments.batch_size,
    )
    assert isinstance(images, list)
    width = len(columns)
    grid = [images[i : i + width] for i in range(0, len(images), width)]
    picture = sampled_picture(grid, arguments.prompt, columns, factor=arguments.enlarge)
    with written_file(arguments.output) as temporary:
        picture.save(temporary)
    print(arguments.output)
    if len(images) == 1 and arguments.enlarge is None and picture.width < 256:
        factor = enlargement(picture, 256)
        print(f"{picture.width} × {picture.height} pixels; --enlarge {factor} writes it larger", file=sys.stderr)


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.world:
        if arguments.set or arguments.config:
            raise ValueError("--world needs no set and no --config; give one or the other")
        check_folder(arguments.output_dir, overwrite=arguments.overwrite, flag="--output_dir")
        from stepfuse.scripts.oracle_world.measure import FILES, measure_world, world_files

        check_output(arguments.output_dir, overwrite=arguments.overwrite, ours=world_files, writes=FILES)
        measure_world(arguments.output_dir, seed=arguments.seed)
        print((arguments.output_dir / "world.md").read_text(encoding="utf-8"))
        return
    if arguments.set is None or arguments.config is None:
        raise ValueError("evaluate needs a set and --config FILE_OR_NAME, such as emoji --config eval/emoji")
    config = find_config(arguments.config, "eval")
    check_device_name(arguments.device)
    check_folder(arguments.output_dir, overwrite=arguments.overwrite, continued="evaluation.json", flag="--output_dir")
    check_set(arguments.set)

    import torch

    from stepfuse.scripts.evaluation.config import read_config
    from stepfuse.scripts.evaluation.report import sentences
    from stepfuse.scripts.evaluation.run import evaluate

    device = check_device(arguments.device)
    summary = evaluate(
        arguments.set,
        read_config(config),
        arguments.output_dir,
        overwrite=arguments.overwrite,
        device=device,
        dtype=getattr(torch, arguments.dtype),
        command=f"stepfuse evaluate {arguments.set} --config {arguments.config}",
        trust_rewards=arguments.trust_rewards,
    )
    if summary:  # the main process
        print("\n".join(f"- {line}" for line in sentences(summary)))
        print(arguments.output_dir / "report.html")


def benchmark(arguments: argparse.Namespace) -> None:
    if (arguments.set is None) == (arguments.architecture is None):
        raise ValueError("benchmark needs a set or --architecture, one of them")
    check_file(arguments.output, overwrite=arguments.overwrite)
    check_device_name(arguments.device)
    check_names(arguments.rules, BENCHMARK_RULES, "--rules")
    check_names(arguments.baselines, BASELINES, "--baselines")
    if not arguments.adapters or min(arguments.adapters) < 1:
        raise ValueError(f"--adapters {','.join(map(str, arguments.adapters))}; expected numbers of 1 or more")
    if arguments.guidance_scale == 1:
        raise ValueError("--guidance_scale 1 is no guidance; the reference is one adapter with guidance, give another")
    if arguments.mode and not arguments.compile:
        raise ValueError(f"--mode {arguments.mode} is a mode of torch.compile; add --compile regional or full")
    if arguments.mode:
        check_names([arguments.mode], COMPILE_MODES, "--mode")
    if arguments.set is not None:
        check_set(arguments.set, instead=("rewards", "training"))

    from stepfuse.fuse.lora.safe_files import write_json
    from stepfuse.scripts.benchmark.sampling import benchmark_sampling, sampling_table
    from stepfuse.scripts.benchmark.settings import SamplingBenchmark

    own = ("adapters", "rules", "baselines", "images", "height", "width", "steps", "repeats", "guidance_scale")
    names = (*own, "rows_at_once", "compile", "mode", "threads", "dtype")
    settings = SamplingBenchmark(
        model=arguments.architecture or str(arguments.set),
        device=check_device(arguments.device),
        memory=not arguments.no_memory,
        **{name: getattr(arguments, name) for name in names},
    )
    results = benchmark_sampling(settings, report=lambda results: write_json(arguments.output, results))
    print(results["machine"])
    print(sampling_table(results))
    print(arguments.output)


def reward_list(arguments: argparse.Namespace) -> None:
    from stepfuse.scripts.recipes.rewards import list_rewards

    list_rewards()


def reward_score(arguments: argparse.Namespace) -> None:
    check_reward(arguments.name)
    check_file(arguments.output, overwrite=arguments.overwrite)
    if arguments.picture is not None:
        check_picture(arguments.picture, overwrite=arguments.overwrite, flag="--picture")
        if arguments.picture.resolve() == arguments.output.resolve():
            raise ValueError(f"--output and --picture are both {arguments.picture}; give one another name")
    check_device_name(arguments.device)
    if not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images}; expected a folder of images")
    if not arguments.prompts.is_file():
        raise ValueError(f"--prompts {arguments.prompts}; expected a file, with one prompt per line for instance")

    import torch

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.scripts.recipes.rewards import score_folder

    quiet_libraries()
    score_folder(
        arguments.name,
        arguments.images,
        arguments.prompts,
        arguments.output,
        device=torch.device(check_device(arguments.device)),
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
        picture=arguments.picture,
    )


def reward_serve(arguments: argparse.Namespace) -> None:
    check_reward(arguments.name)
    check_device_name(arguments.device)

    import torch

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.scripts.recipes.rewards import serve

    quiet_libraries()
    device = torch.device(check_device(arguments.device))
    serve(arguments.name, host=arguments.host, port=arguments.port, token_file=arguments.token_file, device=device)


def reward_benchmark(arguments: argparse.Namespace) -> None:
    check_names(arguments.rewards, ORIGINAL_REWARDS, "--rewards")
    check_file(arguments.output, overwrite=arguments.overwrite)
    if (arguments.images is None) != (arguments.prompts is None):
        raise ValueError("--images and --prompts go together; give both or neither")

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.fuse.lora.safe_files import write_json
    from stepfuse.scripts.benchmark.rewards import benchmark_rewards, reward_table
    from stepfuse.scripts.benchmark.settings import RewardBenchmark

    quiet_libraries()
    settings = RewardBenchmark(
        **{name: getattr(arguments, name) for name in ("rewards", "count", "batch_size", "repeats", "size")},
        images=str(arguments.images or ""),
        prompts=str(arguments.prompts or ""),
        threads=arguments.threads,
    )
    results = benchmark_rewards(settings, report=lambda results: write_json(arguments.output, results))
    print(results["machine"])
    print(reward_table(results))
    print(arguments.output)


def build(arguments: argparse.Namespace) -> None:
    config = find_config(arguments.config, "sets")
    check_device_name(arguments.device)

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.scripts.recipes.build_set import build

    quiet_libraries()
    print(build(config, device=check_device(arguments.device)))


def training_benchmark(arguments: argparse.Namespace) -> None:
    check_names([arguments.model], MODELS, "--model")
    check_names(arguments.algorithms, ALGORITHMS, "--algorithms")
    if not arguments.algorithms:
        raise ValueError(f"--algorithms is empty; expected some of {', '.join(ALGORITHMS)}")
    if arguments.candidates < 2:
        raise ValueError(f"--candidates {arguments.candidates}; expected 2 or more")
    if arguments.timestep_fraction == 0:
        raise ValueError("--timestep_fraction 0; expected a number above 0, up to 1")
    check_file(arguments.output, overwrite=arguments.overwrite)
    check_device_name(arguments.device)

    from stepfuse.fuse.lora.safe_files import write_json
    from stepfuse.scripts.benchmark.settings import TrainingBenchmark
    from stepfuse.scripts.benchmark.training import benchmark_training, training_table

    own = (
        "model",
        "algorithms",
        "images",
        "steps",
        "candidates",
        "resolution",
        "repeats",
        "timestep_fraction",
        "timesteps_per_forward",
    )
    names = (*own, "compile", "gradient_checkpointing", "threads", "dtype")
    settings = TrainingBenchmark(
        device=check_device(arguments.device),
        memory=not arguments.no_memory,
        **{name: getattr(arguments, name) for name in names},
    )
    results = benchmark_training(settings, report=lambda results: write_json(arguments.output, results))
    print(results["machine"])
    print(training_table(results))
    print(arguments.output)


def check_device(name: str | None) -> str:
    """See that a device is there; None is cuda where there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown, or built without it
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return name
