"""`stepfuse set import`."""

import re
from pathlib import Path

from stepfuse.data.stages import import_libraries
from stepfuse.scripts.cli import completion, declare
from stepfuse.scripts.cli.parser import Arguments, Parser, option


def add_arguments(parser: Parser) -> None:
    parser.explain(
        "stepfuse set import style.safetensors --objective style --eta 1.0 --set outputs/set --base OWNER/BASE",
        "The layouts of kohya, peft and diffusers are recognised. A set that does not exist yet is created.",
    )
    text = "Safetensors file, folder of a peft adapter, or Hugging Face Hub id."
    option(parser, "lora", str, text, metavar="FILE_OR_HUB_ID")
    text = "Folder of the set, required; it is created if it does not exist."
    option(parser, "--set", Path, text, metavar="DIR", required=True, complete=completion.adapter_sets)
    text = "Name of the adapter in --weights, such as style; required."
    option(parser, "--objective", str, text, metavar="NAME", required=True, check=check_objective_name)
    text = (
        "Variance of the adapter's denoising steps, as DDIM's eta, from 0 (deterministic) to 1 (DDPM). A LoRA file "
        "does not state it, and the product weighs each adapter by the inverse of its variance; 1.0 treats it like an "
        "adapter trained with DDPM sampling, and noise level a of Flow-GRPO is about a / 1.414 (default: "
        "none; it or --variance is required)."
    )
    declare.variance(parser, "", "the adapter", text)
    text = "Reward that the LoRA is meant to increase, which `stepfuse evaluate` measures."
    option(parser, "--reward", str, text, metavar="NAME", default="unknown", complete=completion.rewards)
    text = "Base model of a new set, a hub id or a folder; required for a new set (default: that of the set)."
    option(parser, "--base", str, text, metavar="MODEL")
    text = "Variant of the weight files of --base, such as fp16 (default: none, or the only one there is)."
    option(parser, "--variant", str, text, metavar="NAME")
    text = (
        "Guidance of a new set, and it must be that of an existing one. full: each adapter makes its own unconditional "
        "prediction, as LoRAs of other tools expect; shared: the base makes it for all; off: none (default: full)."
    )
    declare.guidance(parser, text, "Scale of classifier-free guidance (default: that of the set, or 7.5).")
    text = "Height and width in pixels of the images of a new set, as the LoRA was trained (default: the base's own)."
    option(parser, "--resolution", int, text)
    option(parser, "--steps", int, "Denoising steps (default: those of the set, or 50).")
    declare.license(parser, "the LoRA", "none")
    text = "Leave out layers of text encoders, which cannot be fused (default: refuse a LoRA that has some)."
    option(parser, "--network_only", bool, text, aliases=("--unet_only",))
    text = "File to take from a folder or repository with several (default: the only one)."
    option(parser, "--weight_name", str, text, metavar="FILE")


def check_objective_name(name: str) -> None:
    """Check that a name can be written in weights and be the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"--objective {name!r}; expected letters, digits, '_' and '-'")


def run(arguments: Arguments) -> None:
    from stepfuse.fuse.sets.hub import check_lora

    check_lora(arguments.lora)
    import_libraries()
    variance = declare.schedule_of(arguments, "")

    from stepfuse.fuse.backbones.loading import quiet_libraries
    from stepfuse.fuse.sets.import_lora import import_lora

    quiet_libraries()
    names = (
        *("objective", "reward", "base", "guidance", "guidance_scale", "steps", "license", "network_only"),
        *("weight_name", "variant", "resolution"),
    )
    given = {name: getattr(arguments, name) for name in names}
    loaded = import_lora(arguments.lora, arguments.set, variance=variance, **given)
    print(f"{arguments.set}: {', '.join(loaded.names)}")
