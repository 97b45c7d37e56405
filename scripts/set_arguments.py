"""Arguments of the commands that make, show, change and exchange sets."""

import argparse
from pathlib import Path

from stepfuse.scripts import sets
from stepfuse.scripts.arguments import add_command, add_device, add_guidance

SET = "its folder; a hub id, OWNER/NAME or OWNER/NAME@REVISION; or emoji, the set that is embedded"
LICENSE = "as the hub abbreviates it, such as apache-2.0 or creativeml-openrail-m"


def add_set(actions: argparse._SubParsersAction) -> None:
    """`stepfuse set ACTION`."""
    parent = add_command(
        actions,
        "set",
        "create, check, show and change adapter sets, and exchange LoRAs with other tools",
        "stepfuse set show outputs/set",
    )
    own = parent.add_subparsers(required=True, metavar="action")
    for add in (_add_create, _add_validate, _add_show, _add_profile, _add_card, _add_import, _add_export, _add_merge):
        add(own)


def add_hub(actions: argparse._SubParsersAction) -> None:
    """`stepfuse publish` and `stepfuse pull`."""
    publish = add_command(
        actions,
        "publish",
        "check a set, show what will be sent, ask, and send it with its card to the hub in one commit",
        "stepfuse publish outputs/set OWNER/NAME --private",
    )
    publish.add_argument("set", type=Path, help="the set's folder")
    publish.add_argument("repository", metavar="OWNER/NAME", help="on the hub; made if it is not there")
    publish.add_argument("--private", action="store_true", help="make the repository a private one")
    publish.add_argument("--revision", help="the branch to send it to; made if it is not there (default main)")
    publish.add_argument("--dry_run", "--dry-run", action="store_true", help="show what would be sent; ask nobody")
    publish.add_argument("--yes", action="store_true", help="do not ask")
    publish.set_defaults(run=sets.publish)
    pull = add_command(
        actions, "pull", "copy a set from the hub to a folder", "stepfuse pull OWNER/NAME@REVISION outputs/set"
    )
    pull.add_argument("set", type=Path, metavar="OWNER/NAME", help="with @REVISION for a branch, tag or commit")
    pull.add_argument("output", type=Path, nargs="?", help="the folder (default NAME)")
    pull.add_argument("--overwrite", action="store_true", help="replace what is there")
    pull.set_defaults(run=sets.pull)


def _add_create(own: argparse._SubParsersAction) -> None:
    create = add_command(
        own,
        "create",
        "gather trained adapters of one base into a set",
        "stepfuse set create outputs/set --adapter outputs/alignment --adapter outputs/compressibility",
    )
    create.add_argument("output", type=Path, help="the set's folder")
    create.add_argument(
        "--adapter",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="an adapter's folder, as training left it or in another set; repeat",
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
    create.add_argument("--base", help="what others call the base, where the adapters were trained from a folder")
    create.add_argument("--base_license", metavar="ID", help=f"of the base, {LICENSE}")
    create.add_argument("--license", metavar="ID", help=f"of the adapters, {LICENSE}")
    create.add_argument("--half", action="store_true", help="store the weights in float16, half the size")
    create.add_argument("--overwrite", action="store_true", help="replace what is there")
    create.set_defaults(run=sets.create)


def _add_validate(own: argparse._SubParsersAction) -> None:
    validate = add_command(
        own,
        "validate",
        "check every file of a set, and with --load that it fits its base",
        "stepfuse set validate outputs/set",
    )
    validate.add_argument("set", type=Path, help=SET)
    validate.add_argument("--load", action="store_true", help="load the base and every adapter too")
    validate.set_defaults(run=sets.validate)


def _add_show(own: argparse._SubParsersAction) -> None:
    show = add_command(own, "show", "print what a set holds", "stepfuse set show outputs/set")
    show.add_argument("set", type=Path, help=SET)
    show.set_defaults(run=sets.show)


def _add_profile(own: argparse._SubParsersAction) -> None:
    profile = add_command(
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
    add_guidance(profile)
    profile.add_argument("--seed", type=int, default=0)
    profile.add_argument("--batch_size", type=int, default=8, help="images denoised together (default 8)")
    add_device(profile)
    profile.set_defaults(run=sets.profile)


def _add_card(own: argparse._SubParsersAction) -> None:
    card = add_command(
        own,
        "card",
        "draw the picture of a set's card, keep what an evaluation measured, and write the card",
        "stepfuse set card outputs/set --evaluation outputs/evaluation --license apache-2.0",
    )
    card.add_argument("set", type=Path, help="the set's folder")
    card.add_argument("--evaluation", type=Path, metavar="DIR", help="the output of stepfuse evaluate on this set")
    card.add_argument("--license", metavar="ID", help=f"of adapters that do not state theirs, {LICENSE}")
    card.add_argument("--base_license", metavar="ID", help=f"of the base, {LICENSE}")
    card.add_argument("--prompt", action="append", help="of the picture; repeat for a row each; by default three")
    card.add_argument("--no_strip", action="store_true", help="draw no picture; one that is there stays")
    card.add_argument("--seed", type=int, default=0, help="of the picture")
    add_device(card)
    card.set_defaults(run=sets.write_card)


def _add_import(own: argparse._SubParsersAction) -> None:
    add = add_command(
        own,
        "import",
        "put a LoRA from elsewhere into a set: kohya's, peft's or diffusers' layout",
        "stepfuse set import style.safetensors --objective style --eta 1.0 --set outputs/set",
    )
    add.add_argument("lora", metavar="FILE_OR_HUB_ID", help="a safetensors file, a folder of peft's, or a hub id")
    add.add_argument("--set", type=Path, required=True, metavar="DIR", help="the set's folder; made if it is not there")
    add.add_argument("--objective", required=True, metavar="NAME", help="what weights call it")
    add.add_argument("--eta", type=float, required=True, help="of its transitions, 0 to 1: declared, not measured")
    add.add_argument("--reward", default="unknown", metavar="NAME", help="that it is meant to raise, for evaluate")
    add.add_argument("--base", help="of a set that is made: a hub id or a folder")
    add.add_argument("--variant", help="of the weight files of --base, such as fp16; by default none, or the only one")
    add.add_argument("--guidance", choices=("full", "shared", "off"), help="full by default; a set has one")
    add.add_argument("--guidance_scale", type=float, help="by default the set's, or 7.5")
    add.add_argument("--steps", type=int, help="by default the set's, or 50")
    add.add_argument("--license", metavar="ID", help=f"of its weights, {LICENSE}")
    add.add_argument("--unet_only", action="store_true", help="leave out its text encoders, which cannot be fused")
    add.add_argument("--weight_name", metavar="FILE", help="which file, where there are several")
    add.set_defaults(run=sets.import_lora)


def _add_export(own: argparse._SubParsersAction) -> None:
    export = add_command(
        own,
        "export",
        "write a set's adapters in another tool's format, each for itself",
        "stepfuse set export outputs/set alignment --format kohya --output alignment.safetensors",
    )
    export.add_argument("set", type=Path, help=SET)
    export.add_argument("objective", nargs="?", help="by default every one")
    export.add_argument(
        "--format",
        choices=("kohya", "peft", "diffusers"),
        default="kohya",
        help="kohya: a file for ComfyUI and AUTOMATIC1111 (default); peft: a folder; diffusers: a file",
    )
    export.add_argument("--output", type=Path, help="the file, or a folder for several (default FORMAT-loras/)")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(run=sets.export)


def _add_merge(own: argparse._SubParsersAction) -> None:
    merge = add_command(
        own,
        "merge",
        "write a mixture, the soup, as one LoRA for tools that know nothing of sets",
        "stepfuse set merge outputs/set --weights alignment=0.7,compressibility=0.3 --output lora.safetensors",
    )
    merge.add_argument("set", type=Path, help=SET)
    merge.add_argument("--weights", metavar="A=0.7,B=0.3", help="normalised to sum 1; by default the set's own")
    merge.add_argument("--strength", type=float, default=1.0, help="1: as trained (default)")
    merge.add_argument("--rank", type=int, help="keep so many singular values; by default all: the exact soup")
    merge.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers", help="(default diffusers)")
    merge.add_argument("--output", type=Path, default=Path("lora.safetensors"), help="(default lora.safetensors)")
    merge.add_argument("--overwrite", action="store_true", help="replace what is there")
    merge.set_defaults(run=sets.merge)
