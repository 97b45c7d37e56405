"""Imports go one way: between top-level folders, between the folders in them, and between modules."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import what comes before it.
LAYERS = ["data", "rewards", "fuse", "train", "scripts"]
# In a folder: what each may import of the others.
ALLOWED = {
    "fuse": {
        "diffusion": set(),
        "lora": set(),
        "backbones": {"diffusion", "lora"},
        "rules": {"diffusion", "lora"},
        "sets": {"diffusion", "lora", "backbones", "rules"},
        "sampling": {"diffusion", "lora", "backbones", "rules", "sets"},
    },
    "scripts": {
        "oracle_world": set(),
        "evaluation": set(),
        "emoji": {"recipes"},
        "baselines": set(),
        "benchmark": {"baselines", "evaluation"},
        "recipes": {"evaluation", "oracle_world"},
        "serve": set(),
        "cli": {"benchmark", "evaluation", "oracle_world", "recipes", "serve"},
        "interface": {"evaluation"},
        "gpu": {"benchmark"},
        "release": {"benchmark"},
        "load": {"benchmark", "evaluation"},
    },
}


def modules() -> dict[str, Path]:
    found = {}
    for folder in LAYERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = "stepfuse." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(name: str, file: Path) -> Iterator[str]:
    """The modules of stepfuse that a module imports, wherever it does; its package's own `__init__` left out."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            candidates = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for candidate in candidates:
            while candidate not in MODULES and "." in candidate:
                candidate = candidate.rpartition(".")[0]
            if candidate in MODULES and candidate != name:
                yield candidate


GRAPH = {name: set(imports(name, file)) for name, file in MODULES.items()}


def test_the_test_sees_imports() -> None:
    assert "stepfuse.fuse.diffusion.gaussian" in GRAPH["stepfuse.fuse.diffusion.transition"]
    assert sum(map(len, GRAPH.values())) > 300


def test_no_folder_imports_one_above_it() -> None:
    upward = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if LAYERS.index(other.split(".")[1]) > LAYERS.index(name.split(".")[1])
    ]
    assert upward == []


@pytest.mark.parametrize("top", ALLOWED)
def test_folders_inside_import_what_they_may(top: str) -> None:
    allowed = ALLOWED[top]
    folders = {path.name for path in (ROOT / top).iterdir() if (path / "__init__.py").exists()}
    assert folders == set(allowed)
    wrong = []
    for name, others in GRAPH.items():
        own = name.split(".")
        if own[1] != top or len(own) < 3 or own[2] not in allowed:
            continue
        for other in others:
            theirs = other.split(".")
            if theirs[1] == top and len(theirs) > 2 and theirs[2] != own[2] and theirs[2] not in allowed[own[2]]:
                wrong.append((name, other))
    assert wrong == []


def test_diffusion_imports_nothing_of_stepfuse_but_itself_and_the_transfer_to_devices() -> None:
    law = "stepfuse.fuse.diffusion"
    assert {
        other for name, others in GRAPH.items() if name.startswith(law) for other in others if not other.startswith(law)
    } == {"stepfuse.data.devices"}


def test_no_import_runs_in_a_circle() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
