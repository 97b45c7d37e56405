"""Arguments that several commands have in common."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfuse.data.settings_fields import AT_LEAST_0, SEED, Bounds, parse_mapping
from stepfuse.data.text_files import printable
from stepfuse.fuse.rules.schedules import SCHEDULES
from stepfuse.rewards.reward_name import check_reward
from stepfuse.scripts.cli import completion
from stepfuse.scripts.cli.checks import DEVICES, check_device_name, check_texts
from stepfuse.scripts.cli.parser import Arguments, Container, option

if TYPE_CHECKING:
    from stepfuse.fuse.diffusion.variance import VarianceSchedule

SET = (
    "Adapter set: a folder, a Hugging Face Hub id OWNER/NAME or OWNER/NAME@REVISION, or emoji-flow or emoji, which "
    "are part of the package."
)
SET_FOLDER = "Folder of the adapter set."
DTYPES = ("float32", "float16", "bfloat16")
GUIDANCE = ("shared", "full", "off", "embedded")  # of fuse/backbones/guidance.py, which imports torch
GUIDANCE_TEXT = (
    "Which model makes the unconditional prediction of classifier-free guidance. shared: the base, once for all "
    "adapters; full: each adapter its own, which doubles the cost; off: no guidance (default: that of the set)."
)
SCALE_TEXT = "Scale of classifier-free guidance, such as 7.5; 1 is no guidance (default: that of the set)."


def adapter_set(parser: Container, text: str = SET, **more: Any) -> None:
    given: dict[str, Any] = {"metavar": "SET", "complete": completion.adapter_sets} | more
    option(parser, "set", Path, text, **given)


def prompt(parser: Container, text: str, *, required: bool = False) -> None:
    """`--prompt`, once or more."""
    option(parser, "--prompt", printable, text, metavar="TEXT", action="append", required=required, check=check_texts)


def weights(parser: Container, text: str, **more: Any) -> None:
    option(parser, "--weights", str, text, metavar="A=0.7,B=0.3", complete=completion.weights, **more)


def strength(parser: Container, text: str) -> None:
    option(parser, "--strength", float, text, metavar="S", default=1.0, bounds=AT_LEAST_0)


def seed(parser: Container, text: str = "Random seed.") -> None:
    option(parser, "--seed", int, text, default=0, bounds=SEED)


def eta(parser: Container, name: str, text: str, **more: Any) -> None:
    bounds = Bounds(least=0, most=1, expected="a number from 0 to 1")
    option(parser, name, float, text, metavar="ETA", bounds=bounds, **more)


def variance(parser: Container, prefix: str, what: str, eta_text: str) -> None:
    """The variance schedule of a policy: its eta, or another kind with its parameters."""
    eta(parser, f"--{prefix}eta", eta_text)
    text = (
        f"Kind of variance schedule of {what}, in place of --{prefix}eta: sde for the exact SDE step of flow matching, "
        "share for coefficients-preserving sampling (CPS), or another one (default: eta)."
    )
    option(parser, f"--{prefix}variance", str, text, choices=SCHEDULES)
    text = (
        f"Parameters of --{prefix}variance, such as noise_level=0.7 for sde and share=0.794 for share (default: none)."
    )
    option(parser, f"--{prefix}variance_options", str, text, metavar="NAME=VALUE", nargs="+")


def schedule_of(arguments: Arguments, prefix: str, default: float | None = None) -> "VarianceSchedule":
    """The schedule that the options of `variance` describe, by default that of an eta.

    Raises:
        ValueError: For no schedule, for several, and for parameters that make none.
    """
    from stepfuse.fuse.rules.schedules import schedule_from_dict

    given = vars(arguments)
    eta, kind, options = (given[f"{prefix}{name}"] for name in ("eta", "variance", "variance_options"))
    if eta is not None and kind is not None:
        raise ValueError(f"--{prefix}eta {eta:g} and --{prefix}variance {kind}; expected one of the two")
    if kind is None:
        if options:
            raise ValueError(f"--{prefix}variance_options {options[0]} without --{prefix}variance; give its kind")
        eta = default if eta is None else eta
        if eta is None:
            raise ValueError(
                f"the variance is not given; expected --{prefix}eta, or --{prefix}variance and its options"
            )
        return schedule_from_dict({"kind": "eta", "eta": eta})
    return schedule_from_dict({"kind": kind} | parse_mapping(options or ()))


def batch_size(parser: Container, text: str = "Images denoised at once.", default: int = 8) -> None:
    option(parser, "--batch_size", int, text, default=default)


def guidance(parser: Container, text: str = GUIDANCE_TEXT, scale_text: str = SCALE_TEXT) -> None:
    """Classifier-free guidance, where it is not that of the set."""
    option(parser, "--guidance", str, text, choices=GUIDANCE)
    option(parser, "--guidance_scale", float, scale_text, metavar="G")


def trust(parser: Container) -> None:
    text = (
        "Load rewards of the set that are Python files, which run their code, or servers, which are sent the images "
        "(default: refuse them)."
    )
    option(parser, "--trust_rewards", bool, text)


def reward(parser: Container) -> None:
    text = (
        "Name of a reward, such as image_reward; NAME:FOLDER with its weights; path/to/file.py:function; "
        "path/to/file.yaml; or a server, http://HOST:PORT."
    )
    option(parser, "name", str, text, metavar="REWARD", complete=completion.rewards, check=check_reward)


def license(parser: Container, what: str, default: str, name: str = "--license") -> None:
    known = "an identifier of the Hugging Face Hub, such as apache-2.0 or creativeml-openrail-m"
    option(parser, name, str, f"License of {what}, {known} (default: {default}).", metavar="ID")


def device(parser: Container) -> None:
    text = "Torch device, such as cpu or cuda:1 (default: cuda if available, else cpu)."
    option(parser, "--device", str, text, metavar="NAME", complete=completion.one_of(DEVICES), check=check_device_name)


def precision(parser: Container, of: str = "the base model") -> None:
    device(parser)
    option(parser, "--dtype", str, f"Floating-point type of {of}.", default="float32", choices=DTYPES)


def reward_precision(parser: Container) -> None:
    """Options of commands that run rewards."""
    text = "Floating-point type of the networks of rewards; scores are float32."
    option(parser, "--reward_dtype", str, text, default="float32", choices=DTYPES)
    text = "Use TF32 for float32 matrix products on Ampere and newer GPUs (default: full float32)."
    option(parser, "--allow_tf32", bool, text)


def decode_batch_size(parser: Container) -> None:
    text = "Images decoded at once by the autoencoder (default: as many as fit into a share of the memory)."
    option(parser, "--decode_batch_size", int, text)


def output(parser: Container, default: str | None, text: str) -> None:
    option(parser, "--output", Path, text, metavar="FILE", default=None if default is None else Path(default))
    overwrite(parser, "the output file")


def output_dir(parser: Container, default: str, text: str, *, replaced: str) -> None:
    """A folder to write, and what is replaced in it with `--overwrite`."""
    option(parser, "--output_dir", Path, text, metavar="DIR", default=Path(default))
    overwrite(parser, replaced, folder=True)


def overwrite(parser: Container, what: str, *, folder: bool = False) -> None:
    """Whether existing output is replaced; of a folder, the files that stepfuse wrote."""
    kept = "; files that stepfuse did not write stay" if folder else ""
    option(parser, "--overwrite", bool, f"Replace {what} if it exists{kept} (default: stop with an error).")
