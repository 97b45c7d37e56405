"""The command line `stepfuse`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepfuse",
        description="Fuse diffusion adapters, one a reward, while denoising, for any weights. "
        "Adapters are trained by `accelerate launch train/dpo.py` and `train/ddpo.py`.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_set(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    return parser


def _add(commands: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="by default cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the base")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = _add(
        commands,
        "demo",
        "train two adapters on the embedded emoji base, fuse them, and show the slider and the front between them",
        "stepfuse demo --output_dir outputs/demo",
    )
    demo.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where everything goes")
    demo.add_argument("--overwrite", action="store_true", help="delete what is there")
    demo.add_argument("--seed", type=int, default=0, help="of training and of sampling")
    demo.add_argument("--quick", action="store_true", help="a little of everything: shows the way, not the gain")
    demo.set_defaults(run=_demo)


def _add_set(commands: argparse._SubParsersAction) -> None:
    parent = _add(commands, "set", "create, validate and show adapter sets", "stepfuse set show outputs/set")
    actions = parent.add_subparsers(required=True, metavar="action")
    create = _add(
        actions,
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
    create.set_defaults(run=_set_create)
    validate = _add(
        actions,
        "validate",
        "check every file of a set, and with --load that it fits its base",
        "stepfuse set validate outputs/set",
    )
    validate.add_argument("set", type=Path, help="the set's folder")
    validate.add_argument("--load", action="store_true", help="load the base and every adapter too")
    validate.set_defaults(run=_set_validate)
    show = _add(actions, "show", "print what a set holds", "stepfuse set show outputs/set")
    show.add_argument("set", type=Path, help="the set's folder")
    show.set_defaults(run=_set_show)


def _add_sample(commands: argparse._SubParsersAction) -> None:
    sample = _add(
        commands,
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
    sample.add_argument("--guidance", choices=("shared", "full", "off"), help="by default the set's")
    sample.add_argument("--guidance_scale", type=float, help="by default the set's")
    sample.add_argument("--height", type=int, help="pixels; by default the base's")
    sample.add_argument("--width", type=int, help="pixels; by default the base's")
    sample.add_argument("--batch_size", type=int, default=8, help="images denoised together (default 8)")
    _add_device(sample)
    sample.add_argument("--output", type=Path, default=Path("out.png"), help="the picture (default out.png)")
    sample.add_argument("--overwrite", action="store_true", help="replace the picture if it is there")
    sample.set_defaults(run=_sample)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = _add(
        commands,
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
    evaluate.set_defaults(run=_evaluate)


def _demo(arguments: argparse.Namespace) -> None:
    from stepfuse.scripts.demo import demo

    demo(arguments.output_dir, seed=arguments.seed, overwrite=arguments.overwrite, quick=arguments.quick)


def _set_create(arguments: argparse.Namespace) -> None:
    from stepfuse.fuse.adapter_set import create_set
    from stepfuse.fuse.variance import EtaSchedule

    reference = EtaSchedule(eta=arguments.reference_eta)
    created = create_set(
        arguments.output,
        arguments.adapter,
        oracles=arguments.oracle,
        reference=reference,
        half=arguments.half,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.output}: {', '.join([*created.names, *(o.adapter.name for o in created.oracles)])}")


def _set_validate(arguments: argparse.Namespace) -> None:
    from stepfuse.fuse.adapter_set import load_set

    loaded = load_set(arguments.set)
    if arguments.load:
        from stepfuse.fuse.pipeline import quiet_libraries
        from stepfuse.fuse.sampler import FusedSampler

        quiet_libraries()
        FusedSampler.from_pretrained(loaded)
    print(f"{arguments.set}: valid; {len(loaded.adapters)} adapters of base {loaded.base['name_or_path']!r}")


def _set_show(arguments: argparse.Namespace) -> None:
    from stepfuse.fuse.adapter_set import load_set
    from stepfuse.fuse.variance import schedule_to_dict
    from stepfuse.fuse.weights import label_weights

    loaded = load_set(arguments.set)
    print(f"base        {loaded.base['name_or_path']}")
    print(f"guidance    {loaded.guidance}, scale {loaded.guidance_scale:g}")
    print(f"steps       {loaded.num_inference_steps}")
    print(f"reference   {json.dumps(schedule_to_dict(loaded.reference))}")
    for adapter in loaded.adapters:
        objective, record = adapter.objective, adapter.record
        print(f"\n{objective.name}  (default weight {loaded.default_weights.get(objective.name, 0):g})")
        print(f"  reward    {objective.reward}")
        print(f"  variance  {json.dumps(schedule_to_dict(objective.variance))}")
        print(f"  beta      {objective.beta:g}")
        if "algorithm" in record:
            print(f"  trained   {record['algorithm']}, {record.get('steps')} steps, KL {record.get('kl', 0):.3g} nats")
        for moment, measured in record.get("validation", {}).items():
            print(f"  reward {moment:7} {measured['reward']:.3f} over {measured['images']} images")
    for oracle in loaded.oracles:
        print(f"\noracle {oracle.adapter.name}  ({label_weights(oracle.weights)})")


def _sample(arguments: argparse.Namespace) -> None:
    import torch

    from stepfuse.fuse.adapter_set import load_set
    from stepfuse.fuse.pipeline import quiet_libraries
    from stepfuse.fuse.rules import get_rule
    from stepfuse.fuse.sampler import FusedSampler
    from stepfuse.fuse.weights import Weights, label_weights, parse_weights
    from stepfuse.scripts.pictures import labelled_grid

    if arguments.output.exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} exists; choose another --output or pass --overwrite")
    check_picture(arguments.output)
    device = check_device(arguments.device)
    if any(not prompt.strip() for prompt in arguments.prompt):
        raise ValueError("an empty --prompt; give some words")
    options = {name: getattr(arguments, name) for name in ("candidates", "block_size")}
    rule = get_rule(arguments.rule, **{name: value for name, value in options.items() if value is not None})
    quiet_libraries()
    loaded = load_set(arguments.set)
    columns: list[Weights] = [parse_weights(text) for text in arguments.weights or []]
    if not columns:
        columns = [loaded.default_weights]
    sampler = FusedSampler.from_pretrained(
        loaded,
        rule=rule,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        dtype=getattr(torch, arguments.dtype),
        device=device,
    )
    prompts = [prompt for prompt in arguments.prompt for _ in columns]
    seeds = [arguments.seed + row for row in range(len(arguments.prompt)) for _ in columns]
    images = sampler.sample(
        prompts,
        columns * len(arguments.prompt),
        strength=arguments.strength,
        weights_on=arguments.weights_on,
        num_inference_steps=arguments.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        batch_size=arguments.batch_size,
    )
    assert isinstance(images, list)
    width = len(columns)
    rows = [images[i : i + width] for i in range(0, len(images), width)]
    heads = [label_weights(column).replace("=", " ").replace(",", ", ") for column in columns]
    picture = rows[0][0] if len(images) == 1 else labelled_grid(rows, arguments.prompt, heads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.output)
    print(arguments.output)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.world:
        if arguments.set or arguments.config:
            raise ValueError("--world needs no set and no --config; give one or the other")
        from stepfuse.fuse.adapter_set import claim_output
        from stepfuse.scripts.world_report import measure_world

        claim_output(arguments.output_dir, overwrite=arguments.overwrite)
        measure_world(arguments.output_dir, seed=arguments.seed)
        print((arguments.output_dir / "world.md").read_text())
        return
    if arguments.set is None or arguments.config is None:
        raise ValueError("evaluate needs a set and --config FILE, or --world gmm")
    from stepfuse.scripts.evaluate import evaluate
    from stepfuse.scripts.evaluation import read_config
    from stepfuse.scripts.findings import findings

    device = check_device(arguments.device)
    summary = evaluate(
        arguments.set,
        read_config(arguments.config),
        arguments.output_dir,
        overwrite=arguments.overwrite,
        device=device,
        dtype=getattr(torch, arguments.dtype),
        command=f"stepfuse evaluate {arguments.set} --config {arguments.config}",
    )
    if summary:  # the main process
        print("\n".join(f"- {line}" for line in findings(summary)))
        print(arguments.output_dir / "report.html")


def check_picture(file: Path) -> None:
    """See that a picture can be saved there, before minutes go into drawing it."""
    from PIL import Image

    if file.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output {file}; expected a picture's name, such as out.png")
    if file.is_dir():
        raise ValueError(f"output {file} is a folder; expected a picture's name, such as out.png")
    for parent in file.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"output {file}: {parent} is a file")
            break


def check_device(name: str | None) -> str:
    """See that a device is there; None is cuda where there is one."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown, or built without it
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


if __name__ == "__main__":
    main()
