"""The files of a Space that runs `stepfuse serve` on a set: its card and its Dockerfile."""

import json
from importlib.metadata import version

from huggingface_hub import SpaceCardData
from packaging.requirements import InvalidRequirement, Requirement

from stepfuse.configs import FOLDER
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.fuse.sets.card import code, one_license, plain
from stepfuse.fuse.sets.hub import parse_id

DOCKERFILE, CONSTRAINTS = "Dockerfile", "constraints.txt"
TORCH_INDEX = "https://download.pytorch.org/whl/"
PORT = 7860
TAG = "stepfuse"  # in the front matter of what was written here
README = """---
{front}
---

# {title}

Text to image with the adapter set [{repository}](https://huggingface.co/{repository}) at commit {commit}, on {base}. It
has a LoRA for each of its objectives, {objectives}, which are fused while denoising: move their weights, and the image
is generated for the new mixture, without training.

This Space runs `stepfuse serve`, whose address also answers the OpenAI client's requests for images. Anybody who can
see the Space can generate images with it, within the limits that the page shows.
"""
IMAGE = """# The page of `stepfuse serve` for {source}.
# Written by `stepfuse publish --space` of stepfuse {version}, which replaces it when it is run again.
FROM python:3.11-slim
{git}
# Spaces run the image as the user with uid 1000, who must be able to write the cache of the hub.
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user
ENV HOME=/home/user HF_HOME=/home/user/.cache/huggingface PATH=/home/user/.local/bin:$PATH PYTHONUNBUFFERED=1

# torch comes first: the build that stepfuse would bring has several GB of CUDA libraries.
RUN {install_torch}
{copy}RUN {install}

EXPOSE {port}
CMD {command}
"""
GIT = """
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
"""


def release() -> str:
    """The requirement for the stepfuse that is running."""
    return f"stepfuse[serve]=={version('stepfuse')}"


def requirement(text: str) -> str:
    """A requirement of pip, or a bare URL, with the extra `serve`; ValueError for one that pip would refuse."""
    try:
        parsed = Requirement(text if "://" not in text or " @ " in text else f"stepfuse @ {text}")
    except InvalidRequirement as error:
        raise ValueError(
            f"--package {text!r}; expected what pip installs, such as stepfuse==1.0 or git+https://HOST/REPOSITORY"
        ) from error
    parsed.extras.add("serve")
    return str(parsed)


def serve_command(source: str) -> list[str]:
    """What the Space runs; `--public` because whoever sees a Space may use it, and it has no users of its own."""
    return ["stepfuse", "serve", source, "--host", "0.0.0.0", "--port", str(PORT), "--public"]


def space_files(
    title: str, loaded: AdapterSet, repository: str, commit: str, *, package: str, torch: str
) -> dict[str, str]:
    """The contents of a Space's files by their names.

    Args:
        loaded: the set, of which the manifest is enough.
        repository: of the set on the hub, `owner/name`.
        package: what pip installs; of the release of this version, its dependencies are those that were tested.
        torch: the build of torch, a folder of download.pytorch.org/whl.
    """
    files = {
        "README.md": _readme(title, loaded, repository, commit),
        DOCKERFILE: _dockerfile(f"{repository}@{commit}", package=package, torch=torch),
    }
    if package == release():
        files[CONSTRAINTS] = (FOLDER / CONSTRAINTS).read_text(encoding="utf-8")
    return files


def _readme(title: str, loaded: AdapterSet, repository: str, commit: str) -> str:
    base = loaded.base["name_or_path"]
    on_hub = parse_id(base) is not None
    front = SpaceCardData(
        title=title,
        emoji="🎨",
        colorFrom="indigo",
        colorTo="pink",
        sdk="docker",
        app_port=PORT,
        license=one_license(loaded),
        models=[repository, *([base] if on_hub else [])],
        tags=[TAG, "text-to-image", "lora", "multi-objective"],
        short_description="Text to image with a weight for each reward",  # the hub takes 60 characters
    )
    return README.format(
        front=front.to_yaml(line_break="\n"),
        title=plain(title),
        repository=repository,
        commit=code(commit),
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else code(base),
        objectives=", ".join(map(code, loaded.names)),
    )


def _dockerfile(source: str, *, package: str, torch: str) -> str:
    # Another version may need other dependencies than those that were tested with this one.
    constraint = ["--constraint", CONSTRAINTS] if package == release() else []
    # Lists are not read by a shell, whatever characters a requirement has.
    pip = ["pip", "install", "--user", "--no-cache-dir"]
    return IMAGE.format(
        source=source,
        version=version("stepfuse"),
        git=GIT if "git+" in package else "",
        copy=f"COPY {CONSTRAINTS} .\n" if constraint else "",
        # torch alone, by its pin: the other packages of its index are not all that the constraints ask for.
        install_torch=json.dumps([*pip, "--index-url", TORCH_INDEX + torch, _torch_pin() if constraint else "torch"]),
        install=json.dumps([*pip, *constraint, package]),
        port=PORT,
        command=json.dumps(serve_command(source)),
    )


def _torch_pin() -> str:
    """The version of torch that was tested."""
    lines = (FOLDER / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))
