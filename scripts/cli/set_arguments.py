"""Arguments of the commands that make, show, change and exchange sets."""

import argparse
from pathlib import Path

from stepfuse.scripts.cli import completion, sets
from stepfuse.scripts.cli.arguments import (
    add_command,
    add_device,
    add_guidance,
    add_overwrite,
    add_set,
    number,
    whole,
)
from stepfuse.scripts.cli.choices import GUIDANCE

LICENSE = "an identifier of the Hugging Face Hub, such as apache-2.0 or creativeml-openrail-m"
FOLDER = "Folder of the adapter set."


def add_set_commands(actions: argparse._SubParsersAction) -> None:
    """`stepfuse set ACTION`."""
    parent = add_command(
        actions,
        "set",
        "create, check, show and change adapter sets, and exchange LoRAs with other tools",
        "stepfuse set show emoji",
    )
    commands = parent.add_subparsers(required=True, metavar="action", title="actions")
    for add in (_add_create, _add_validate, _add_show, _add_profile, _add_card, _add_import, _add_export, _add_merge):
        add(commands)


def add_hub(actions: argparse._SubParsersAction) -> None:
    """`stepfuse publish` and `stepfuse pull`."""
    publish = add_command(
        actions,
        "publish",
        "check a set, list the files to upload, ask, and upload them to the Hugging Face Hub in one commit",
        "stepfuse publish outputs/set OWNER/NAME --private",
    )
    add_set(publish, text=FOLDER)
    publish.add_argument(
        "repository", metavar="OWNER/NAME", help="Repository on the hub; it is created if it does not exist."
    )
    publish.add_argument(
        "--private", action="store_true", help="Create the repository as a private one (default: public)."
    )
    publish.add_argument(
        "--revision",
        metavar="BRANCH",
        help="Branch to upload to; it is created if it does not exist (default: main).",
    )
    publish.add_argument(
        "--dry_run", action="store_true", help="Only list what would be uploaded; needs no token (default: upload)."
    )
    publish.add_argument("--yes", action="store_true", help="Upload without asking (default: ask first).")
    publish.set_defaults(run=sets.publish)
    pull = add_command(
        actions,
        "pull",
        "copy a set from the Hugging Face Hub to a folder",
        "stepfuse pull OWNER/NAME@REVISION outputs/set",
    )
    add_set(
        pull,
        text="Repository on the hub; OWNER/NAME@REVISION for a branch, tag or commit.",
        metavar="OWNER/NAME",
    )
    pull.add_argument("output", type=Path, metavar="FOLDER", nargs="?", help="Output folder (default: NAME).")
    add_overwrite(pull, "the set in the output folder", folder=True)
    pull.set_defaults(run=sets.pull)


def _add_create(commands: argparse._SubParsersAction) -> None:
    create = add_command(
        commands,
        "create",
        "combine trained adapters of one base model into a set",
        "stepfuse set create outputs/set --adapter outputs/alignment --adapter outputs/compressibility",
    )
    create.add_argument("output", type=Path, metavar="FOLDER", help="Output folder of the set.")
    create.add_argument(
        "--adapter",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="Folder of an adapter, as written by training or found in another set. Required; repeat for each adapter.",
    )
    create.add_argument(
        "--oracle",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="Folder of an adapter trained on a weighted sum of the rewards (--reward weighted:…), which evaluations "
        "compare fusion with; repeat for several (default: none).",
    )
    create.add_argument(
        "--reference_eta",
        type=number,
        default=1.0,
        metavar="ETA",
        help="Variance of the base policy's denoising steps, as DDIM's eta, from 0 (deterministic) to 1 (DDPM). It is "
        "used where the strength is not 1 (default: %(default)s).",
    )
    create.add_argument(
        "--base",
        metavar="OWNER/NAME",
        help="Hub id of the base model, recorded in place of the local folder that the adapters were trained from "
        "(default: as the adapters record it).",
    )
    create.add_argument("--base_license", metavar="ID", help=f"License of the base model, {LICENSE} (default: none).")
    create.add_argument(
        "--license", metavar="ID", help=f"License of the adapters, {LICENSE} (default: as the adapters record it)."
    )
    create.add_argument(
        "--half",
        action="store_true",
        help="Store the weights in float16, which halves their size (default: in the type they have).",
    )
    add_overwrite(create, "the set in the output folder", folder=True)
    create.set_defaults(run=sets.create)


def _add_validate(commands: argparse._SubParsersAction) -> None:
    validate = add_command(
        commands,
        "validate",
        "check every file of a set, and with --load that its adapters fit the base model",
        "stepfuse set validate emoji",
    )
    add_set(validate)
    validate.add_argument(
        "--load",
        action="store_true",
        help="Load the base model and every adapter too (default: check the files only).",
    )
    validate.set_defaults(run=sets.validate)


def _add_show(commands: argparse._SubParsersAction) -> None:
    show = add_command(
        commands,
        "show",
        "print the base model, the objectives and the measurements of a set",
        "stepfuse set show emoji",
    )
    add_set(show)
    show.set_defaults(run=sets.show)


def _add_profile(commands: argparse._SubParsersAction) -> None:
    profile = add_command(
        commands,
        "profile",
        "measure at each denoising step how far the soup is from the product",
        "stepfuse set profile outputs/set --prompts prompts.txt",
        "The result, a KL divergence in nats, is stored in the set; `stepfuse sample --gate` uses it.",
    )
    add_set(profile, text=FOLDER)
    prompts = profile.add_argument(
        "--prompts",
        metavar="FILE_OR_NAME",
        help="Text file with one prompt per line, or a prompt set such as partiprompts:32 for 32 of its prompts "
        "(default: colours-heldout:16, or emoji-heldout:16 for the embedded base).",
    )
    completion.complete(prompts, completion.prompt_sets)
    profile.add_argument(
        "--steps", type=whole, metavar="N", help="Number of denoising steps (default: that of the set)."
    )
    add_guidance(profile)
    profile.add_argument("--seed", type=whole, default=0, metavar="N", help="Random seed (default: %(default)s).")
    profile.add_argument(
        "--batch_size", type=whole, default=8, metavar="N", help="Images denoised at once (default: %(default)s)."
    )
    add_device(profile)
    profile.set_defaults(run=sets.profile)


def _add_card(commands: argparse._SubParsersAction) -> None:
    card = add_command(
        commands,
        "card",
        "write the model card of a set, with a picture of samples and the results of an evaluation",
        "stepfuse set card outputs/set --evaluation outputs/evaluation --license apache-2.0",
    )
    add_set(card, text=FOLDER)
    card.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="Output folder of `stepfuse evaluate` for this set, whose results go into the card (default: the results "
        "stored in the set, if any).",
    )
    card.add_argument(
        "--license", metavar="ID", help=f"License of adapters that do not record one, {LICENSE} (default: none)."
    )
    card.add_argument(
        "--base_license", metavar="ID", help=f"License of the base model, {LICENSE} (default: as the set records it)."
    )
    card.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="Prompt of a row of the picture; repeat for more rows (default: three held-out prompts).",
    )
    card.add_argument(
        "--no_strip",
        action="store_true",
        help="Draw no picture; an existing one stays in the set (default: draw one).",
    )
    card.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="Random seed of the picture (default: %(default)s)."
    )
    add_device(card)
    card.set_defaults(run=sets.write_card)


def _add_import(commands: argparse._SubParsersAction) -> None:
    add = add_command(
        commands,
        "import",
        "add a LoRA of another tool to a set",
        "stepfuse set import style.safetensors --objective style --eta 1.0 --set outputs/set --base OWNER/BASE",
        "The layouts of kohya, peft and diffusers are recognised. A set that does not exist yet is created.",
    )
    add.add_argument(
        "lora", metavar="FILE_OR_HUB_ID", help="Safetensors file, folder of a peft adapter, or Hugging Face Hub id."
    )
    existing = add.add_argument(
        "--set",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder of the set, required; it is created if it does not exist.",
    )
    completion.complete(existing, completion.adapter_sets)
    add.add_argument(
        "--objective",
        required=True,
        metavar="NAME",
        help="Name of the adapter in --weights, such as style; required.",
    )
    add.add_argument(
        "--eta",
        type=number,
        required=True,
        metavar="ETA",
        help="Variance of the adapter's denoising steps, as DDIM's eta, from 0 (deterministic) to 1 (DDPM). A LoRA "
        "file does not state it, and the product weighs each adapter by the inverse of its variance; 1.0 treats it "
        "like an adapter trained with DDPM sampling. Required.",
    )
    reward = add.add_argument(
        "--reward",
        default="unknown",
        metavar="NAME",
        help="Reward that the LoRA is meant to increase, which `stepfuse evaluate` measures (default: %(default)s).",
    )
    completion.complete(reward, completion.rewards)
    add.add_argument(
        "--base",
        metavar="MODEL",
        help="Base model of a new set, a hub id or a folder; required for a new set (default: that of the set).",
    )
    add.add_argument(
        "--variant",
        metavar="NAME",
        help="Variant of the weight files of --base, such as fp16 (default: none, or the only one there is).",
    )
    add.add_argument(
        "--guidance",
        choices=GUIDANCE,
        help="Guidance of a new set, and it must be that of an existing one. full: each adapter makes its own "
        "unconditional prediction, as LoRAs of other tools expect; shared: the base makes it for all; off: none "
        "(default: full).",
    )
    add.add_argument(
        "--guidance_scale",
        type=number,
        metavar="G",
        help="Scale of classifier-free guidance (default: that of the set, or 7.5).",
    )
    add.add_argument("--steps", type=whole, metavar="N", help="Denoising steps (default: those of the set, or 50).")
    add.add_argument("--license", metavar="ID", help=f"License of the LoRA, {LICENSE} (default: none).")
    add.add_argument(
        "--unet_only",
        action="store_true",
        help="Leave out layers of text encoders, which cannot be fused (default: refuse a LoRA that has some).",
    )
    add.add_argument(
        "--weight_name",
        metavar="FILE",
        help="File to take from a folder or repository with several (default: the only one).",
    )
    add.set_defaults(run=sets.import_lora)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = add_command(
        commands,
        "export",
        "write the adapters of a set as LoRAs for other tools, one file or folder each",
        "stepfuse set export emoji alignment --format kohya --output alignment.safetensors",
    )
    add_set(export)
    objective = export.add_argument(
        "objective", metavar="OBJECTIVE", nargs="?", help="Name of the adapter to export (default: all adapters)."
    )
    completion.complete(objective, completion.objectives)
    export.add_argument(
        "--format",
        choices=("kohya", "peft", "diffusers"),
        default="kohya",
        help="kohya: a file for ComfyUI and AUTOMATIC1111; peft: a folder; diffusers: a file (default: %(default)s).",
    )
    export.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="Output file of one adapter, or output folder for all (default: in the folder FORMAT-loras).",
    )
    add_overwrite(export, "output files")
    export.set_defaults(run=sets.export)


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = add_command(
        commands,
        "merge",
        "write a weighted sum of the adapters, the soup, as one LoRA for other tools",
        "stepfuse set merge emoji --weights alignment=0.7,compressibility=0.3 --output lora.safetensors",
    )
    add_set(merge)
    weights = merge.add_argument(
        "--weights",
        metavar="A=0.7,B=0.3",
        help="Weight of each objective; they are normalised to sum to 1 (default: the set's default weights).",
    )
    completion.complete(weights, completion.weights)
    merge.add_argument(
        "--strength",
        type=number,
        default=1.0,
        metavar="S",
        help="Factor of the whole LoRA: 0 is the base model, 1 the strength of training (default: %(default)s).",
    )
    merge.add_argument(
        "--rank",
        type=whole,
        metavar="N",
        help="Truncate each layer to this rank by its singular values (default: the sum of the ranks, which is exact).",
    )
    merge.add_argument(
        "--format",
        choices=("diffusers", "kohya"),
        default="diffusers",
        help="Layout of the file; kohya for ComfyUI and AUTOMATIC1111 (default: %(default)s).",
    )
    merge.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("lora.safetensors"),
        help="Output file, a name that ends in .safetensors (default: %(default)s).",
    )
    add_overwrite(merge, "the output file")
    merge.set_defaults(run=sets.merge)
