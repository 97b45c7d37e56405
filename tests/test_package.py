"""The layout: folders that setuptools maps into one namespace package, and what can go wrong with that."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stepfuse.scripts.release.packages import BESIDE, LAYERS
from stepfuse.scripts.release.packages import REPOSITORY_ONLY as SCRIPTS_ONLY

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("PACKAGE.md", "MANIFEST.in"),
    *(".gitignore", ".pre-commit-config.yaml", ".ci", "tests", "docs", *LAYERS),
}
# Baselines of the benchmarks, builders of the emoji base, the checks of a GPU and of a release, the load on a server.
REPOSITORY_ONLY = tuple(f"scripts/{name}" for name in SCRIPTS_ONLY)
MEGABYTE = 2**20

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def test_every_folder_is_a_package_of_the_namespace_or_stays_in_the_repository():
    setuptools = PYPROJECT["tool"]["setuptools"]
    files = [*SOURCES, *(ROOT / "configs").rglob("*.yaml")]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in files}
    packages = {folder: "stepfuse." + folder.replace("/", ".") for folder in folders if not _repository_only(folder)}
    packages["scripts/interface"] = "stepfuse"
    assert setuptools["package-dir"] == {name: folder for folder, name in packages.items()}
    assert sorted(setuptools["packages"]) == sorted(packages.values())
    assert set(setuptools["package-data"]) <= set(setuptools["packages"])
    assert all((ROOT / folder / "__init__.py").is_file() for folder in REPOSITORY_ONLY)
    for layer in LAYERS:
        assert setuptools["package-dir"][f"stepfuse.{layer}"] == layer
        assert "py.typed" in setuptools["package-data"][f"stepfuse.{layer}"]
        assert (ROOT / layer / "py.typed").is_file()


def test_an_sdist_can_be_made_of_what_an_unpacked_archive_is_copied_to():
    project = PYPROJECT["project"]
    included = re.search(r"^include (.+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)[1].split()
    assert {project["readme"], *project["license-files"], *included, "pyproject.toml", "MANIFEST.in"} == {*BESIDE}
    assert {folder.split("/")[0] for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values()} == {*LAYERS}


def test_the_types_of_what_stays_in_the_repository_are_checked_too():
    (copied,) = re.findall(r"cp -R (.+) \"\$scratch", (ROOT / "scripts" / "test").read_text())
    assert copied.split() == [*REPOSITORY_ONLY]


def test_every_module_imports_from_outside_the_checkout(tmp_path):
    paths = [path for path in SOURCES if path.name != "__main__.py"]
    program = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *map(_module, paths)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"},
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr  # which transformers asks for, and nothing here needs
    # -I keeps the working directory and PYTHONPATH out of sys.path: this is the installed package.
    assert [Path(line).name for line in done.stdout.splitlines()] == [path.name for path in paths]


def test_no_module_leans_on_what_another_imported():
    # After `import stepfuse.fuse` or `from stepfuse.fuse import rules`, `rules.product` is there only where another
    # module imported it. As imports also make no circle (test_imports), any module can be the first, though the test
    # above imports them one after another.
    packages = {_module(path.parent / "__init__.py") for path in SOURCES}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in _nodes(path)
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "stepfuse" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and packages & {f"{node.module}.{alias.name}" for alias in node.names})
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["train", "scripts"])
def test_no_file_shadows_an_installed_module_where_its_folder_leads_the_path(folder):
    # `accelerate launch train/dpo.py` puts train/ in front of sys.path: train/datasets.py would be `datasets`.
    installed = {
        module for module, owners in importlib.metadata.packages_distributions().items() if owners != ["stepfuse"]
    }
    optional = {"bitsandbytes", "clip", "deepspeed", "ImageReward", "timm", "torchvision", "wandb", "xformers"}
    taken = installed | optional | sys.stdlib_module_names
    entries = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()]
    assert {path.stem for path in entries} - {"__init__", "__main__", "__pycache__"} & taken == set()


def test_gitignore_drops_no_source():
    _git("rev-parse", "--git-dir")
    paths = [
        p for top in [*LAYERS, "tests"] for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    names = [str(path.relative_to(ROOT)) for path in paths]
    assert "data/emoji.py" in names
    names += ["data/emoji-base/pipeline/unet/diffusion_pytorch_model.safetensors"]
    # Without --no-index a file that is tracked already would count as not ignored.
    ignored = _git("check-ignore", "--no-index", "--", *names, codes=(0, 1))
    assert ignored == []


def test_imports_go_one_way():
    wrong = []
    for path in SOURCES:
        layer = LAYERS.index(path.relative_to(ROOT).parts[0])
        for line, name in _imports(path):
            head, _, rest = name.partition(".")
            if head == "stepfuse" and LAYERS.index(rest.split(".")[0]) > layer:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert wrong == []


def test_no_import_is_bare_or_relative():
    # From the checkout's root `import fuse.gaussian` works, and makes a second copy of every class.
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]
        for line, name in _imports(path)
        if name.split(".")[0] in ("", *LAYERS)
    ]
    assert wrong == []


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if name.startswith("stepfuse/")}
    assert {name.split("/")[0] for name in names - ours} == {f"stepfuse-{PYPROJECT['project']['version']}.dist-info"}
    embedded = [
        path
        for name in ("emoji-base", "emoji-flow", "emoji-set", "emoji-flow-set")
        for path in (ROOT / "data" / name).rglob("*")
    ]
    single = (
        "scripts/evaluation/findings.j2",
        "scripts/evaluation/report.html.j2",
        "fuse/sets/adapter_set.schema.json",
        "rewards/bert-base-uncased-vocab.txt",
        "scripts/interface/__init__.pyi",
    )
    page = (ROOT / "scripts" / "serve" / "page").iterdir()
    data = [*embedded, *page, *(ROOT / "configs").rglob("*.*"), *(ROOT / name for name in single)]
    typed = [ROOT / folder / "py.typed" for folder in (*LAYERS, "scripts/interface")]
    wanted = {path for path in [*SOURCES, *typed, *data] if path.is_file() and "__pycache__" not in path.parts}
    paths = (path.relative_to(ROOT).as_posix() for path in wanted)
    assert ours == {_in_wheel(path) for path in paths if not _repository_only(path)}
    assert {"stepfuse/__init__.py", "stepfuse/scripts/benchmark/harness.py"} <= ours
    assert not any("baselines" in name or "originals" in name or "scripts/emoji" in name for name in ours)


def test_every_dependency_has_a_pin_that_it_allows():
    lines = (ROOT / "configs" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["dev"], *extras["serve"], *extras["docs"], *extras["ocr"]]
    for requirement in (Requirement(each) for each in listed if not each.startswith("stepfuse[")):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_version_is_the_same_everywhere():
    version = PYPROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_the_top_level_holds_nothing_unexpected():
    assert {path.relative_to(ROOT).parts[0] for path in _tracked()} <= TOP_LEVEL


def test_the_repository_stays_small():
    sizes = {path: path.stat().st_size for path in _tracked()}
    assert [path for path, size in sizes.items() if size > 40 * MEGABYTE] == []
    assert sum(sizes.values()) < 120 * MEGABYTE


def test_no_file_names_a_path_outside_the_repository():
    outside = re.compile("|".join([r"\.\./" + "shared", *(rf"(?<![\w.\-])/{top}/" for top in ("work", "tmp", "opt"))]))
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if outside.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


def _repository_only(path: str) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in REPOSITORY_ONLY)


def _in_wheel(path: str) -> str:
    return "stepfuse/" + path.removeprefix("scripts/interface/")


def _module(path: Path) -> str:
    parts = ("stepfuse", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file; a relative one begins with a dot."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


@cache
def _nodes(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def _tracked() -> list[Path]:
    """Files that are committed or would be by `git add --all`."""
    names = set(_git("ls-files", "--cached", "--others", "--exclude-standard"))
    return [path for name in sorted(names) if (path := ROOT / name).is_file()]


def _git(*arguments: str, codes: tuple[int, ...] = (0,)) -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # A person's own ignore rules say nothing about this repository's.
    command = ["git", "-c", f"core.excludesFile={os.devnull}", "-c", "core.quotePath=false", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in codes, done.stderr
    return done.stdout.splitlines()
