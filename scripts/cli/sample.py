"""`stepfuse sample`."""

import sys
from pathlib import Path

from stepfuse.data.output_file import atomic_file, unused_path
from stepfuse.data.settings_fields import Bounds
from stepfuse.data.stages import import_libraries, stage
from stepfuse.data.text_files import printable
from stepfuse.fuse.backbones.compilation import HOW, MODES, check_compilation
from stepfuse.fuse.rules.options import RULE_OPTIONS
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.rules.weights import lowest
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.checks import RULE_FLAGS, check_picture, check_rule, check_set, check_weights
from stepfuse.scripts.cli.options import add_settings
from stepfuse.scripts.cli.parser import Arguments, Container, Parser, option

OUTPUT = Path("out.png")


def add_arguments(parser: Parser) -> None:
    parser.explain(
        'stepfuse sample emoji-flow --weights lightness=0.3,subject_size=0.7 --prompt "a fox on a green background"',
        "Several weights or prompts make a labelled grid.",
    )
    declare.adapter_set(parser)
    _add_images(parser.group("what to generate"))
    _add_fusion(parser)
    guidance = parser.group("guidance")
    declare.guidance(guidance)
    text = (
        "Part of the denoising steps that is guided, as shares from 0, the first step, to 1, the end, such as 0.2-0.8; "
        "the other steps cost less."
    )
    option(guidance, "--guidance_interval", str, text, metavar="BEGIN-END", default="0-1")
    _add_speed(parser.group("speed and memory"))
    output = parser.group("output")
    text = "Picture to write, such as fox.png or fox.jpg (default: out.png; if it exists, out-2.png, out-3.png, …)."
    declare.output(output, None, text)
    text = (
        "Write every pixel as a square of N × N pixels with crisp edges, from 1 to 64 (default: 1 for a single image; "
        "in a grid, enough to make images at least 128 pixels wide)."
    )
    option(output, "--enlarge", int, text, bounds=Bounds(least=1, most=64, expected="a whole number from 1 to 64"))


def _add_images(images: Container) -> None:
    declare.prompt(images, "Prompt; required, repeat for more rows.", required=True)
    text = (
        "What guidance steers away from (default: none, for which diffusers takes an empty prompt, and zeros for "
        "Stable Diffusion XL models that ask for them)."
    )
    option(images, "--negative_prompt", printable, text, metavar="TEXT")
    text = (
        "Weight of each objective, normalised to sum to 1; repeat for more columns. A=0.9@0-0.5,0.2@0.5-1 changes it "
        "over the denoising steps, here at half of them. A weight below 0 steers away from its objective, further than "
        "adapters were trained for (default: the set's default weights)."
    )
    declare.weights(images, text, action="append")
    text = (
        "Random seed of the first row, 0 to 2^64 - 1; each further row adds 1, and the columns of a row share theirs."
    )
    declare.seed(images, text)
    option(images, "--steps", int, "Number of denoising steps, such as 25 (default: that of the set).")
    for name in ("height", "width"):
        text = f"{name.capitalize()} of the images in pixels, such as 512 (default: that of the set or the base)."
        option(images, f"--{name}", int, text, metavar="PIXELS")


def _add_fusion(parser: Parser) -> None:
    fusion = parser.group("fusion")
    text = (
        f"Fusion rule, one of {', '.join(RULES)}, or a class in a file, path/to/file.py:Class (default: that of "
        "the set)."
    )
    option(fusion, "--rule", str, text, metavar="NAME", complete=completion.rules)
    text = "0 is the base model, 1 the strength that the adapters were trained with, and more extrapolates."
    declare.strength(fusion, text)
    text = (
        "What the weights multiply. exponents: the log-densities of the adapters, so that equal weights mean equally "
        "much of each adapter; rewards: the rewards, which also takes into account the KL coefficient beta that each "
        "adapter was trained with."
    )
    option(fusion, "--weights_on", str, text, choices=("exponents", "rewards"), default="exponents")
    for rule, options in RULE_OPTIONS.items():
        add_settings(parser, options, rule=rule)
    declare.trust(fusion)


def _add_speed(speed: Container) -> None:
    declare.batch_size(speed)
    text = (
        "batched: one forward pass for all adapters; separate: one forward pass per adapter, which is slower and takes "
        "any kind of LoRA."
    )
    option(speed, "--forwards", str, text, choices=("batched", "separate"), default="batched")
    text = (
        "Largest batch of one forward pass, in rows: one row per image and adapter, and one per image for guidance. "
        "Fewer take less memory and more time, such as 4 (default: all at once)."
    )
    option(speed, "--rows_at_once", int, text)
    text = (
        "Give every forward pass exactly --rows_at_once rows (by default those of one image with all adapters), and "
        "encode and decode one image at a time: an image then has the same bits whatever others it is generated with. "
        "Smaller batches are padded, and the padding is discarded."
    )
    option(speed, "--batch_invariant", bool, text)
    text = (
        "Compile the network with torch.compile. regional: each transformer block; full: all of it (default: no "
        "compilation)."
    )
    option(speed, "--compile", str, text, choices=HOW)
    text = (
        "Mode of torch.compile. reduce-overhead: CUDA graphs; max-autotune: CUDA graphs, and kernels chosen by "
        "measurement. Both need --compile and a GPU (default: default)."
    )
    option(speed, "--mode", str, text, choices=MODES)
    declare.decode_batch_size(speed)
    declare.precision(speed)
    declare.reward_precision(speed)


def parse_interval(text: str) -> tuple[float, float]:
    """`0.2-0.8` → (0.2, 0.8)."""
    try:
        begin, end = map(float, text.split("-"))
    except ValueError:
        begin, end = 1.0, 0.0
    if not 0 <= begin < end <= 1:
        raise ValueError(f"--guidance_interval {text!r}; expected two shares of the steps in order, such as 0.2-0.8")
    return begin, end


def run(arguments: Arguments) -> None:
    if arguments.output is None:
        arguments.output = OUTPUT if arguments.overwrite else unused_path(OUTPUT, OUTPUT.suffix)
    check_picture(arguments.output, overwrite=arguments.overwrite)
    options = {name: value for name in RULE_FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.rule is not None:
        check_rule(arguments.rule, options)
    interval = parse_interval(arguments.guidance_interval)
    if arguments.compile and arguments.forwards == "separate":
        raise ValueError("--compile needs --forwards batched: separate forwards would compile once for each adapter")
    if arguments.mode and not arguments.compile:
        raise ValueError(f"--mode {arguments.mode} is a mode of torch.compile; add --compile regional or full")
    columns = check_weights(arguments.weights or [], check_set(arguments.set))
    below = {name for weights in columns for name, weight in weights.items() if lowest(weight) < 0}
    if below:
        stage(
            f"The weight of {' and '.join(sorted(below))} is below 0, which no adapter was trained for: images may "
            "become empty or noise."
        )

    import_libraries()

    import torch

    from stepfuse.data.devices import allow_tf32
    from stepfuse.data.lettering import enlargement
    from stepfuse.data.seeds import numbered_generator
    from stepfuse.fuse.rules.registry import get_default_rule, get_rule
    from stepfuse.fuse.sampling.pictures import sampled_picture
    from stepfuse.fuse.sets.adapter_set import load_set
    from stepfuse.scripts.cli.load import load_sampler, prepare_device

    if arguments.allow_tf32:
        allow_tf32()
    if arguments.compile:
        check_compilation(arguments.compile, arguments.mode or "default", prepare_device(arguments.device))
    loaded = load_set(arguments.set, read_weights=False)
    rule = get_rule(arguments.rule, **options) if arguments.rule else get_default_rule(loaded.default_rule, **options)
    columns = columns or [loaded.default_weights]
    sampler = load_sampler(
        loaded,
        arguments,
        rule=rule,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        forwards=arguments.forwards,
        rows_at_once=arguments.rows_at_once,
        batch_invariant=arguments.batch_invariant,
        trust_rewards=arguments.trust_rewards,
        reward_dtype=getattr(torch, arguments.reward_dtype),
        decode_batch_size=arguments.decode_batch_size,
    )
    if arguments.compile:
        sampler.compile(arguments.compile, mode=arguments.mode or "default")
    rows = [row for row in range(len(arguments.prompt)) for _ in columns]
    images = sampler.sample(
        [arguments.prompt[row] for row in rows],
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
    grid = [images[i : i + len(columns)] for i in range(0, len(images), len(columns))]
    picture = sampled_picture(grid, arguments.prompt, columns, factor=arguments.enlarge)
    with atomic_file(arguments.output) as temporary:
        picture.save(temporary)
    print(arguments.output)
    if len(images) == 1 and arguments.enlarge is None and picture.width < 256:
        factor = enlargement(picture, 256)
        print(f"{picture.width} × {picture.height} pixels; --enlarge {factor} writes it larger", file=sys.stderr)
