# PYTHON_ARGCOMPLETE_OK
"""The command line `stepfuse`. Nothing here imports torch or a command that is not run."""

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence

from stepfuse.data.garbage import end_without_collection
from stepfuse.data.main_process import is_main_process
from stepfuse.data.stages import stages_shown
from stepfuse.data.text_files import print_any_text, printable
from stepfuse.scripts.cli.parser import Parser

COMMANDS = {  # in the order of --help; `set create` is the module set_create in this folder
    "demo": "train adapters for two or three rewards, fuse them, and show images and the trade-off between the rewards",
    "set": "create, check, show and change adapter sets, and exchange LoRAs with other tools",
    "set create": "combine trained adapters of one base model into a set",
    "set validate": "check every file of a set, and with --load that its adapters fit the base model",
    "set show": "print the base model, the objectives and the measurements of a set",
    "set profile": "measure at each denoising step how far the soup is from the product",
    "set card": "write the model card of a set, with a picture of samples and the results of an evaluation",
    "set import": "add a LoRA of another tool to a set",
    "set export": "write the adapters of a set as LoRAs for other tools, one file or folder each",
    "set merge": "write a weighted sum of the adapters, the soup, as one LoRA for other tools",
    "sample": "generate images with a set, for any weights of its objectives",
    "serve": "generate images over HTTP, and serve a page with a slider for each weight",
    "evaluate": "measure fusion rules and baselines of a set on the same prompts and seeds",
    "build": "train the adapters of a set, create the set, profile and evaluate it, and write its card",
    "publish": "check a set, list the files to upload, ask, and upload them to the Hugging Face Hub in one commit",
    "pull": "copy a set from the Hugging Face Hub to a folder",
    "reward": "list rewards, score images with one, serve one",
    "reward list": "print every reward with its size, its license, and whether it has a gradient",
    "reward score": "score a folder of images and write a table",
    "reward serve": "serve a reward over HTTP, for --reward http://HOST:PORT on another machine",
    "benchmark": "time sampling, rewards, training or the server, beside other implementations of the same",
    "benchmark sampling": "time fused sampling and other methods, as multiples of one adapter with guidance",
    "benchmark rewards": "time rewards against the packages they come from, and compare their scores",
    "benchmark training": "time one optimiser step, sampling and update, against the loops of ddpo-pytorch and SPO",
    "benchmark serve": "load a server with requests at random times, beside diffusers' set_adapters in a queue",
}
ELSEWHERE = {
    "train": "training is python -m stepfuse.train.dpo, or stepfuse.train.ddpo, such as --config dpo/emoji-flow-joint",
}
GROUPS = {  # commands that have actions, with the example and further sentences of their help pages
    "set": ("stepfuse set show emoji", ""),
    "reward": ("stepfuse reward list", ""),
    "benchmark": (
        "stepfuse benchmark emoji --output bench.json",
        "The action may be left out before a set and before options: it is sampling.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an invalid input ends in one line and exit status 1."""
    # Before transformers is imported: on import it warns about torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    end_without_collection()
    print_any_text()
    parsed = argparse.Namespace()
    try:
        parsed = parse(sys.argv[1:] if arguments is None else arguments)
        with stages_shown(shown=is_main_process()):
            parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.exit(141)  # 128 + SIGPIPE, as of a command that the signal ends
    except ValueError as error:
        sys.exit(f"error: {printable(error)}")
    except (MemoryError, RuntimeError) as error:
        from stepfuse.scripts.cli.memory import out_of_memory_message

        message = out_of_memory_message(error, parsed)
        if message is None:
            raise
        sys.exit(f"error: {printable(message)}")
    except KeyboardInterrupt:
        print(f"\ninterrupted{_how_to_continue(parsed)}", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as of a command that the signal ends


def _output_is_closed() -> bool:
    """Whether the reader of standard output has ended, as `head` does; what is left to print is then dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
    return True


def _how_to_continue(parsed: argparse.Namespace) -> str:
    """What to do after Ctrl-C, for commands that keep what they have done."""
    if not getattr(parsed, "continued", False) or getattr(parsed, "world", None):
        return ""
    cleared = getattr(parsed, "overwrite", False) and hasattr(parsed, "output_dir")
    return f"; the same command{' without --overwrite' if cleared else ''} continues from whatever was saved"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; its function is the attribute `run`."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    words = _with_action(arguments)
    parser = make_parser(words)
    if not words:
        parser.print_help(sys.stderr)
        sys.exit(2)
    return parser.parse_args(words)


def _with_action(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the action that may be left out: `benchmark emoji` is that of sampling."""
    command, *rest = words or [""]
    known = rest and (rest[0] in ("-h", "--help") or f"{command} {rest[0]}" in COMMANDS)
    return [command, "sampling", *rest] if command == "benchmark" and not known else list(words)


def _complete() -> None:
    """Answer the shell, which asks by argcomplete's protocol what may follow on a line, and exit."""
    import argcomplete

    program, *given = os.environ["COMP_LINE"].split(" ")
    words = _with_action(given) if given[1:] else given  # a command that is not followed by a space is completed itself
    point = int(os.environ["COMP_POINT"]) + len(" ".join(words)) - len(" ".join(given))
    os.environ |= {"COMP_LINE": " ".join([program, *words]), "COMP_POINT": str(point)}
    argcomplete.autocomplete(make_parser(words), always_complete_options=False)


def make_parser(words: Sequence[str] | None = None) -> Parser:
    """The parser of `stepfuse`. Only the module of the command that `words` begin with is imported; without, all."""
    parser = Parser(
        prog="stepfuse",
        description="Fuse diffusion adapters, one per reward, while denoising, for any weights.\n"
        "Adapters are trained by `accelerate launch -m stepfuse.train.dpo`, or `python -m` for one process.",
        epilog="first command:\n"
        '  stepfuse sample emoji-flow --prompt "a red apple on a blue background" --output apple.png\n'
        'shell completion:\n  eval "$(register-python-argcomplete stepfuse)"',
    )
    parser.elsewhere = ELSEWHERE
    parser.add_argument("--version", action=_Version, nargs=0, help="Print the version.")
    actions = {"": parser.add_subparsers(metavar="command", title="commands", required=True, parser_class=Parser)}
    for name, summary in COMMANDS.items():
        parent, _, last = name.rpartition(" ")
        command = actions[parent].add_parser(last, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in GROUPS:
            command.explain(*GROUPS[name])
            actions[name] = command.add_subparsers(metavar="action", title="actions", required=True)
        elif words is None or [*words][: len(name.split())] == name.split():
            module = importlib.import_module(f"stepfuse.scripts.cli.{name.replace(' ', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Prints the version; to look it up costs more than the rest of `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(f"stepfuse {importlib.metadata.version('stepfuse')}")
        parser.exit()


if __name__ == "__main__":
    main()
