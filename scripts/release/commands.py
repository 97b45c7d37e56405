"""What a user does with an installed package, in small: one function for each part of the check.

The commands are those of the documents; the flags beside them only make them quick. They run in an empty folder, in
the order of `COMMANDS`, and later ones use what earlier ones wrote.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from stepfuse.data.text_files import write_text
from stepfuse.data.yaml_file import yaml_text
from stepfuse.scripts.release.processes import CommandFailed, Shell

LAUNCH = "accelerate launch --quiet -m stepfuse.train"
TRAINING = {
    "max_train_steps": 1,
    "train_batch_size": 4,
    "sample_num_steps": 3,
    "num_validation_images": 2,
}
DDPO, DPO = {**TRAINING, "num_generations": 2}, {**TRAINING, "num_candidates": 2}
EVALUATION = {
    "prompts": "emoji-heldout:2",
    "seeds_per_prompt": 2,
    "rules": ["product", "soup"],
    "grid": 1,
    "steps": 2,
    "strip_prompts": 1,
    "kl_seeds": 0,
}
BUILD = {
    "output_dir": "built",
    "objectives": [
        {"algorithm": "ddpo", "config": "ddpo/emoji-compressibility", **DDPO},
        {"algorithm": "dpo", "config": "dpo/emoji-colourfulness", **DPO},
    ],
    "evaluate": "evaluation.yaml",
}
IMPORTS = """
import importlib.util, sys
import stepfuse

assert stepfuse.__file__.startswith(sys.prefix), f"stepfuse is imported from {stepfuse.__file__}"
for folder in ("baselines", "release"):
    assert importlib.util.find_spec(f"stepfuse.scripts.{folder}") is None, f"scripts/{folder} can be imported"
print(*(type(getattr(stepfuse, name)).__name__ for name in dir(stepfuse)))
"""
SERVE = """
import base64, io, json
from PIL import Image
from stepfuse.scripts.benchmark.server_process import server_process

with server_process(["emoji"]) as server:
    status, page = server.ask("GET", "/")
    assert status == 200 and b"<html" in page, status
    weights = {"colourfulness": 0.7, "alignment": 0.3}
    status, body = server.ask("POST", "/v1/images/generations", {"prompt": "a fox", "weights": weights, "steps": 2})
    assert status == 200, body
    picture = Image.open(io.BytesIO(base64.b64decode(json.loads(body)["data"][0]["b64_json"])))
    assert picture.size == (64, 64), picture.size
    status = server.stop()
    assert status == 0, f"the server ended with status {status} after SIGTERM"
"""


def version(shell: Shell) -> None:
    """The command, its help, and the public names, from the environment and not from a checkout."""
    if not re.fullmatch(r"stepfuse \d+\.\d+\.\d+\n", printed := shell.run("stepfuse --version")):
        raise CommandFailed(f"`stepfuse --version` printed {printed!r}")
    shell.run("stepfuse --help")
    shell.run(["python", "-c", IMPORTS])


def rewards(shell: Shell) -> None:
    shell.run("stepfuse reward list")
    images = shell.folder / "images"
    images.mkdir()
    for number, colour in enumerate(("red", "gray")):
        Image.new("RGB", (64, 48), colour).save(images / f"{number}.png")
    write_text(shell.folder / "prompts.txt", "a red square\na gray square\n")
    shell.run("stepfuse reward score colourfulness --images images --prompts prompts.txt --output scores.csv")
    require(shell, "scores.csv")


def sample(shell: Shell) -> None:
    shell.run('stepfuse sample emoji --prompt "a fox on a green background" --steps 2 --output fox.png')
    with Image.open(shell.folder / "fox.png") as picture:
        if picture.size != (64, 64):
            raise CommandFailed(f"fox.png has {picture.size} pixels; expected 64 × 64")


def demo(shell: Shell) -> None:
    shell.run("stepfuse demo --quick --output_dir demo")
    require(shell, "demo/results.json")


def training(shell: Shell) -> None:
    """Both programs; then the commands that a training prints at its end, as they stand."""
    shell.run(f"{LAUNCH}.dpo --config dpo/emoji-colourfulness --output_dir colourfulness {flags(DPO)}")
    printed = shell.run(f"{LAUNCH}.ddpo --config ddpo/emoji-compressibility --output_dir compressibility {flags(DDPO)}")
    following = [line.strip() for line in printed.splitlines() if line.startswith("  stepfuse ")]
    if len(following) != 2:
        raise CommandFailed(f"training printed {len(following)} next commands; expected two")
    for command in following:
        shell.run(command)
    require(shell, "compressibility-set/adapter_set.json")


def sets(shell: Shell) -> None:
    shell.run("stepfuse set create set --adapter colourfulness --adapter compressibility")
    shell.run("stepfuse set show set")
    shell.run("stepfuse set validate set --load")


def distill(shell: Shell) -> None:
    small = {"max_train_steps": 1, "train_batch_size": 2, "num_validation_images": 1, "train_timestep_fraction": 0.2}
    shell.run(f"{LAUNCH}.distill emoji --config distill/emoji --output_dir distilled {flags(small)}")


def evaluate(shell: Shell) -> None:
    write_text(shell.folder / "evaluation.yaml", yaml_text(EVALUATION))
    shell.run("stepfuse evaluate emoji --config evaluation.yaml --output_dir evaluation")
    require(shell, "evaluation/report.html", "evaluation/fronts.png")


def serve(shell: Shell) -> None:
    """The page, a picture by HTTP, and an end by SIGTERM."""
    shell.run(["python", "-c", SERVE])


def build(shell: Shell) -> None:
    """From two packaged configurations to a set with its evaluation and card."""
    write_text(shell.folder / "evaluation.yaml", yaml_text(EVALUATION))
    write_text(shell.folder / "build.yaml", yaml_text(BUILD))
    shell.run("stepfuse build build.yaml")
    require(shell, "built/set/adapter_set.json", "built/set/README.md")
    manifest = json.loads((shell.folder / "built" / "set" / "adapter_set.json").read_text(encoding="utf-8"))
    if "evaluation" not in manifest:
        raise CommandFailed("the set that was built has no evaluation")


def require(shell: Shell, *names: str) -> None:
    """Raise CommandFailed unless the commands have written these files."""
    if missing := [name for name in names if not Path(shell.folder, name).is_file()]:
        raise CommandFailed(f"{', '.join(missing)} was not written")


def flags(settings: Mapping[str, float]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


COMMANDS: dict[str, Callable[[Shell], None]] = {
    each.__name__: each for each in (version, rewards, sample, demo, training, sets, distill, evaluate, serve, build)
}
NEEDS = {"sets": "training"}
