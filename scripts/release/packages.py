"""Build the sdist and the wheel from the files of the repository, and check what is in them."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path, PurePosixPath

from bs4 import BeautifulSoup
from markdown_it import MarkdownIt
from packaging.metadata import Metadata

from stepfuse.scripts.release.processes import CommandFailed, Shell

LAYERS = ("configs", "data", "rewards", "fuse", "train", "scripts")  # of the package; each may import those before it
BESIDE = (
    "pyproject.toml",
    "PACKAGE.md",
    "LICENSE",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CITATION.cff",
)  # and what is packed too
# Folders that no user needs. An editable install finds them in the checkout.
REPOSITORY_ONLY = ("baselines", "emoji", "gpu", "load", "release")
NEEDED = (  # one file of each kind that is no Python
    "data/emoji-base/pipeline/model_index.json",
    "data/emoji-flow/model_index.json",
    "data/emoji-set/adapter_set.json",
    "data/emoji-flow-set/adapter_set.json",
    "configs/constraints.txt",
    "configs/sets/emoji.yaml",
    "fuse/sets/adapter_set.schema.json",
    "rewards/bert-base-uncased-vocab.txt",
    "scripts/evaluation/report.html.j2",
    "scripts/serve/page/index.html",
    "__init__.pyi",
    "py.typed",
)
ABSOLUTE = re.compile("https?://|mailto:|#")


@dataclass(frozen=True, kw_only=True)
class Packages:
    """What a release uploads; `sdist` is None where only a wheel was given."""

    wheel: Path
    sdist: Path | None


def copy_repository(root: Path, target: Path) -> None:
    """Copy the files of a checkout that are committed or would be by `git add --all`.

    Setuptools would also pack what an earlier build or an editor left in a checkout. Of an unpacked archive, which is
    no checkout, what a package is built from is copied.

    Raises:
        ValueError: if git is missing or does not list the files.
    """
    if not (root / ".git").exists():
        target.mkdir(parents=True, exist_ok=True)
        for name in BESIDE:
            if (root / name).is_file():
                shutil.copy(root / name, target / name)
        for name in LAYERS:
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        return
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"git is not installed, so the files of {root} cannot be listed; install it, or pass --wheel FILE"
        ) from error
    if listed.returncode:
        said = " ".join(listed.stderr.decode(errors="replace").split())
        raise ValueError(f"git cannot list the files of {root}: {said}; mend this, or pass --wheel FILE")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():  # and not deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target / name)


def build_packages(root: Path, folder: Path, shell: Shell) -> Packages:
    """Build both from a copy of the checkout; the wheel built from the sdist must have the same files."""
    source, unpacked = folder / "source", folder / "unpacked"
    copy_repository(root, source)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    shell.run([*build, str(folder / "dist"), "--sdist", "--wheel", str(source)])
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # not in Python 3.11 before 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(unpacked)
    (top,) = unpacked.iterdir()
    shell.run([*build, str(folder / "again"), "--wheel", str(top)])
    (again,) = (folder / "again").glob("*.whl")
    check_same_files(wheel, again)
    for place in (source, unpacked, folder / "again"):
        shutil.rmtree(place)
    return Packages(wheel=wheel, sdist=sdist)


def check_same_files(wheel: Path, again: Path) -> None:
    """Raise CommandFailed unless two wheels have the same names with the same content."""
    first, second = (
        {entry.filename: entry.CRC for entry in zipfile.ZipFile(file).infolist()} for file in (wheel, again)
    )
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if different:
        raise CommandFailed(f"the wheel built from the sdist differs in {_few(different)}")


def check_wheel(wheel: Path) -> str:
    """What a wheel holds, in words; CommandFailed for what does not belong there or is missing."""
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"--wheel {wheel} cannot be read: {error}; expected a wheel of stepfuse") from error
    names = [name for name in archive.namelist() if not name.endswith("/")]
    heads = {name.split("/")[0] for name in names}
    (info,) = [head for head in heads if head.endswith(".dist-info")] or [""]
    if not info.startswith("stepfuse-"):
        raise ValueError(f"--wheel {wheel} is no wheel of stepfuse")
    only = tuple(f"stepfuse/scripts/{folder}/" for folder in REPOSITORY_ONLY)
    stray = [
        name
        for name in names
        if not name.startswith(("stepfuse/", f"{info}/"))
        or name.startswith(only)
        or "__pycache__" in PurePosixPath(name).parts
    ]
    if stray:
        raise CommandFailed(f"the wheel holds {_few(stray)}, which no user needs")
    needed = [f"stepfuse/{name}" for name in NEEDED] + [f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"]
    if missing := sorted({*needed} - {*names}):
        raise CommandFailed(f"the wheel lacks {_few(missing)}")
    check_metadata(archive.read(f"{info}/METADATA"))
    return f"{len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB"


def check_metadata(content: bytes) -> None:
    """Hold a wheel's metadata to its specification, and its description to what an index of packages can show.

    The description stands alone there: a link or picture that is relative to the repository leads nowhere.
    """
    try:
        metadata = Metadata.from_email(content, validate=True)
    except ExceptionGroup as error:
        raise CommandFailed(f"the metadata are not valid: {'; '.join(map(str, error.exceptions))}") from error
    if metadata.description_content_type != "text/markdown":
        raise CommandFailed(f"the description is {metadata.description_content_type}; expected text/markdown")
    page = MarkdownIt("commonmark").enable("table").render(str(message_from_bytes(content).get_payload()))
    tags = BeautifulSoup(page, "html.parser").find_all(True)
    links = [str(tag[name]) for tag in tags for name in ("href", "src", "srcset") if tag.has_attr(name)]
    if links := [link for link in links if not ABSOLUTE.match(link)]:
        raise CommandFailed(f"the description has relative links, which lead nowhere on an index: {_few(links)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
