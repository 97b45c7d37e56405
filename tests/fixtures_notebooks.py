"""Notebooks of the documentation, run cell by cell."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from tests.fixtures_documents import ROOT

FOLDER = ROOT / "docs" / "notebooks"
PERSONAL = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")  # by default below HOME


def read_notebook(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def tags_of(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


@contextmanager
def kernel(folder: Path) -> Iterator[NotebookClient]:
    """A kernel in a folder, with the commands of this environment, and without the hub.

    Neither it nor its client, which finds it by a file in the runtime folder, reads or writes a person's own settings.
    """
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(new_notebook(), timeout=600, resources={"metadata": {"path": str(folder)}})
    own = {name: str(folder / "jupyter" / name) for name in PERSONAL}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in own.items():
            Path(path).mkdir(parents=True)  # else IPython takes another one
            patch.setenv(name, path)
        with client.setup_kernel(env=environment | own):
            yield client


def run_notebook(client: NotebookClient, name: str, **parameters: Any) -> NotebookNode:
    """Run the code of a notebook in a kernel that has forgotten all names, and give it back with its outputs.

    The cell tagged `parameters` is followed by one with other values, and the one tagged `install` is left out. An
    error of a cell is raised.
    """
    notebook = client.nb = read_notebook(name)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "install" not in tags_of(cell):
            cells.append(cell)
            if "parameters" in tags_of(cell):
                cells.append(new_code_cell(assignments(parameters, cell.source)))
    notebook.cells = [new_code_cell("%reset -f"), *cells]
    for index, cell in enumerate(notebook.cells):
        client.execute_cell(cell, index)
    return notebook


def assignments(values: Mapping[str, Any], known: str) -> str:
    """Assignments of other values to names that the cell of parameters assigns."""
    names: dict[str, Any] = {}
    exec(known, names)
    unknown = values.keys() - names.keys()
    assert not unknown, f"no parameters: {unknown}"
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


def images_in(notebook: NotebookNode) -> int:
    """How many pictures the cells show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def printed_by(notebook: NotebookNode) -> str:
    """What the cells print to standard output and standard error."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")
