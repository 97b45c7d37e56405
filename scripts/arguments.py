"""Arguments that commands have in common."""

import argparse
from pathlib import Path


def add_command(actions: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A command with what `--help` says of it."""
    return actions.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the models are, and in what precision."""
    parser.add_argument("--device", default=None, help="by default cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the base")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Of a set."""
    parser.add_argument("--guidance", choices=("shared", "full", "off"), help="by default the set's")
    parser.add_argument("--guidance_scale", type=float, help="by default the set's")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Of a set."""
    parser.add_argument(
        "--trust_rewards", action="store_true", help="load rewards of the set that are files of code or servers"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Of images."""
    parser.add_argument("--height", type=int, help="pixels; by default the base's")
    parser.add_argument("--width", type=int, help="pixels; by default the base's")


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """A file to write."""
    parser.add_argument("--output", type=Path, default=Path(default), help=f"the file (default {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def names(text: str) -> tuple[str, ...]:
    """A,B."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """1,2."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers such as 1,2,4,8") from None
