"""`from stepfuse import …`: the names that README and cards use."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepfuse

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted((ROOT / "data").rglob("README.md"))


@pytest.mark.parametrize("name", stepfuse.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(stepfuse, name) is not None
    assert name in dir(stepfuse)


def test_importing_the_package_loads_no_library() -> None:
    program = (
        "import sys, stepfuse; stepfuse.__version__; print(*sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'FusedPipelin'"):
        _ = stepfuse.FusedPipelin  # type: ignore[attr-defined]


def test_type_checkers_are_told_the_modules_that_names_are_loaded_from() -> None:
    tree = ast.parse(Path(str(stepfuse.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    declared = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared.keys() | {"__version__"} == set(stepfuse.__all__)
    for name, (module, original) in declared.items():
        assert getattr(stepfuse, name) is getattr(sys.modules[str(module)], original), name


def test_documents_and_cards_use_public_names_only() -> None:
    inner = [
        (document.relative_to(ROOT).as_posix(), line)
        for document in [*DOCUMENTS, *CARDS]
        for line in document.read_text(encoding="utf-8").splitlines()
        # Commands and entries of the catalogue are files inside the package, and use its own modules.
        if re.match(r"\s*(from|import) stepfuse\.(?!scripts\.cli|rewards\.named_reward|data\.stages)", line)
    ]
    assert inner == []
