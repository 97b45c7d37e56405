"""The notebooks of the documentation run as they stand, with smaller parameters."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.unet_names import UNetNames
from stepfuse.fuse.lora.export import save_kohya, save_lora
from stepfuse.fuse.sets.adapter import read_factors
from tests.fixtures_notebooks import FOLDER, images_in, kernel, printed_by, read_notebook, run_notebook, tags_of
from tests.fixtures_tiny import save_adapter, save_stable_diffusion

NAMES = ("quickstart.ipynb", "free-gpu.ipynb")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookClient]:
    """One kernel for both, which imports the libraries once."""
    with kernel(tmp_path_factory.mktemp("notebooks")) as started:
        yield started


@pytest.mark.slow
def test_the_quickstart_runs(client: NotebookClient) -> None:
    small = {"train_steps": 1, "images_per_step": 2, "compared_images": 2, "measured_prompts": 3, "steps": 4}
    done = run_notebook(client, "quickstart.ipynb", **small)
    printed = printed_by(done)
    assert "adapter contrast, step 1: outputs/quickstart/contrast" in printed
    rows = re.findall(r"^ +\d\.\d\d( +[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]){2}$", printed, re.MULTILINE)
    assert len(rows) == 5
    assert images_in(done) == 1 + 3 + 2 + 1  # first images, two sliders, the front


@pytest.mark.slow
def test_the_notebook_for_a_gpu_runs_on_tiny_models(client: NotebookClient, tmp_path: Path) -> None:
    """A Stable Diffusion of random weights; of the two LoRAs one in diffusers' layout and one in kohya's."""
    base = save_stable_diffusion(tmp_path / "base")
    adapters = [save_adapter(tmp_path / name, base, name, seed=seed) for seed, name in enumerate(("one", "other"))]
    (part, first), (_, second) = map(read_factors, adapters)
    save_lora(tmp_path / "one.safetensors", first, part)
    names = UNetNames(config=load_pipeline(str(base)).unet.config)
    save_kohya(tmp_path / "other.safetensors", second, names, title="other", prediction="epsilon")
    models = {"base": str(base), "variant": "", "spo_file": "", "dpo_file": ""}
    models |= {"spo": str(tmp_path / "one.safetensors"), "dpo": str(tmp_path / "other.safetensors")}
    done = run_notebook(client, "free-gpu.ipynb", **models, device="cpu", dtype="float32", steps=2, images_at_once=2)
    assert "outputs/preferences: spo, dpo" in printed_by(done)
    assert images_in(done) == 1 + 2 + 1


def test_a_kernel_leaves_the_home_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    with kernel(tmp_path / "work") as client:
        client.nb.cells = [new_code_cell("1 + 1")]
        client.execute_cell(client.nb.cells[0], 0)
    assert [*home.rglob("*")] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_a_page_of_the_documentation(name: str) -> None:
    """Its title leads the first cell, and what installs and what may be changed is tagged."""
    notebook = read_notebook(name)
    assert re.match(r"# \S", notebook.cells[0].source)
    assert not any(
        re.search(r"^# ", cell.source, re.MULTILINE) for cell in notebook.cells[1:] if cell.cell_type == "markdown"
    )
    tagged = [tag for cell in notebook.cells for tag in tags_of(cell)]
    assert sorted(tagged) == ["install", "parameters"]
    assert (FOLDER / name).stat().st_size < 1e6


def test_the_quickstart_shows_its_outputs_and_the_other_has_none() -> None:
    """Those of one run from top to bottom, without an error or the name of a machine's folder."""
    shown, bare = map(read_notebook, NAMES)
    code = [cell for cell in shown.cells if cell.cell_type == "code"]
    ran = [cell for cell in code if "install" not in tags_of(cell)]
    assert [cell.execution_count for cell in ran] == [*range(1, len(ran) + 1)]
    assert images_in(shown) == 7
    assert all(output.output_type != "error" for cell in ran for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|Users)/", json.dumps(shown))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in bare.cells)
