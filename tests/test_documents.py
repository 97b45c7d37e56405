"""The examples of extensions are run with checks of what comes out, and what the documents say is there is there."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.rules.weights import Weights
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.rewards import catalogue
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.metrics import METRICS
from stepfuse.scripts.evaluation.run import evaluate
from tests.fixtures_documents import ROOT, blocks
from tests.fixtures_tiny import save_adapter, save_stable_diffusion


def example(part: str, document: str = "CONTRIBUTING.md") -> dict[str, object]:
    """The names that the document's example mentioning `part` defines."""
    (code,) = [block for block in blocks(document, "python") if part in block]
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, document, "exec"), names)
    return names


def test_the_first_page_says_how_to_install_before_the_first_command() -> None:
    text = (ROOT / "docs/get-started.md").read_text()
    assert text.index("scripts/setup") < text.index("source .venv/bin/activate") < text.index("stepfuse sample emoji")
    assert text.index("pip install torch") < text.index("pip install .") < text.index("stepfuse sample emoji")


def test_the_tree_of_folders_names_what_is_there() -> None:
    (tree,) = [block for block in blocks("docs/architecture.md", "text") if "train/" in block]
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    named, top = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"( *)(\w+)/", line):
            top = top if match[1] else match[2]
            named.add(f"{top}/{match[2]}" if match[1] else top)
    packages = {file.parent.relative_to(ROOT).as_posix() for top in named for file in (ROOT / top).rglob("__init__.py")}
    inner = {folder for folder in packages if not folder.startswith(("configs/", "tests/")) and folder.count("/") == 1}
    assert {folder for folder in named if "/" in folder} == inner


def test_the_pictures_of_the_readme_exist() -> None:
    for place in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        if place.endswith(".svg"):
            assert ElementTree.parse(ROOT / place).getroot().tag.endswith("svg")
            continue
        with Image.open(ROOT / place) as picture:
            picture.verify()


def test_the_example_reward_is_loaded_and_listed_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = ("docs/how-to/reward.md", "CONTRIBUTING.md")
    parts = [block for page in pages for block in blocks(page, "python") if "brightness" in block]
    (line,) = [block for block in blocks("CONTRIBUTING.md", "text") if "BRIGHTNESS" in block]
    name, place = re.findall(r'"([^"]+)"', line)
    (tmp_path / "brightness_example.py").write_text("\n".join(parts))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        catalogue.REWARDS.data, name, place.replace("stepfuse.rewards.brightness", "brightness_example")
    )
    white, half_red = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    half_red[:, 0, :2] = 1
    values = load_reward(name)(torch.cat([white, half_red]), ["", ""])
    assert values.tolist() == pytest.approx([100.0, 100 * 0.299 / 2])
    main(["reward", "list"])
    assert re.search(r"^brightness +yes +", capsys.readouterr().out, re.MULTILINE)
    main(["reward", "list", "--sources"])
    assert re.search(r"^brightness +Apache-2.0 +ITU-R BT.601$", capsys.readouterr().out, re.MULTILINE)


def test_the_example_rule_works_by_name_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sampling, evaluation and benchmark; by name with the line that CONTRIBUTING adds to the registry."""
    (line,) = re.findall(r'"strongest": "(stepfuse\.[\w.]+:\w+)"', (ROOT / "CONTRIBUTING.md").read_text())
    name = line.partition(":")[0]
    module = ModuleType(name)
    vars(module).update(example("class Strongest", "docs/how-to/rule.md"))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(RULES, "strongest", line)
    rules = ["strongest", f"{save_example_rule(tmp_path)}:Strongest"]
    monkeypatch.chdir(tmp_path)
    base = save_stable_diffusion(Path("base"))
    for seed, reward in enumerate(("colourfulness", "compressibility")):
        save_adapter(Path(reward), base, reward, seed=seed, reward=reward)
    create_set(Path("set"), [Path("colourfulness"), Path("compressibility")])
    for number, rule in enumerate(rules):
        mixture = "--weights compressibility=0.7,colourfulness=0.3"
        main(f"sample set --prompt fox {mixture} --rule {rule} --steps 2 --output {number}.png".split())
    assert Path("0.png").read_bytes() == Path("1.png").read_bytes()
    Path("prompts.txt").write_text("a red apple\na green fox\n")
    settings = {"prompts": "prompts.txt", "seeds_per_prompt": 2, "grid": 1, "rules": rules, "steps": 1}
    Path("config.yaml").write_text(yaml.safe_dump(settings | {"strip_prompts": 0, "kl_seeds": 0}))
    main(["evaluate", "set", "--config", "config.yaml", "--output_dir", "evaluation"])
    assert set(json.loads(Path("evaluation/summary.json").read_text())["rules"]) == {"base", *rules}
    small = "--adapters 2 --rivals= --images 1 --steps 1 --repeats 1 --no_memory --output bench.json"
    main(f"benchmark set --rules {','.join(rules)} {small}".split())
    assert {row["way"] for row in json.loads(Path("bench.json").read_text())["rows"]} == {"one adapter", *rules}


def save_example_rule(folder: Path) -> Path:
    (code,) = blocks("docs/how-to/rule.md", "python")
    (folder / "mine.py").write_text(code)
    return folder / "mine.py"


def test_the_example_rule_is_the_expert_of_the_largest_exponent(tmp_path: Path) -> None:
    sampler = FusedSampler.from_pretrained("emoji", rule=f"{save_example_rule(tmp_path)}:Strongest")
    mixtures: list[Weights] = [{"alignment": 0.7, "compressibility": 0.3}, {"alignment": 0.4, "compressibility": 0.6}]
    singles: list[Weights] = [{"alignment": 1.0}, {"compressibility": 1.0}]

    def draw(sampler: FusedSampler, weights: list[Weights]) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        latents = sampler.sample(
            ["fox", "cat"], weights, generator=generator, num_inference_steps=2, output_type="latent", progress=False
        )
        assert isinstance(latents, torch.Tensor)
        return latents

    torch.testing.assert_close(draw(sampler, mixtures), draw(sampler.with_rule("product"), singles))


def test_the_example_metric_is_in_the_table_the_summary_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the image that the table keeps, in 8 bits, it is mean((p_(x+1) - p_x)²)."""
    monkeypatch.setitem(METRICS, "edge_energy", METRICS["kl"])  # the example replaces it, and the end removes it
    example("def edge_energy")
    base = save_stable_diffusion(tmp_path / "base")
    for seed, name in enumerate(("colourfulness", "compressibility")):
        save_adapter(tmp_path / name, base, name, seed=seed, reward=name, guidance="off")
    create_set(tmp_path / "set", [tmp_path / "colourfulness", tmp_path / "compressibility"])
    config = EvaluationConfig(
        prompts="emoji-heldout:2",
        seeds_per_prompt=1,
        rules=["product"],
        scales={"colourfulness": 5.0, "compressibility": 0.2},
        steps=2,
        kl_seeds=0,
    )
    evaluate(tmp_path / "set", config, tmp_path / "out")
    results = pd.read_parquet(tmp_path / "out" / "results.parquet")
    for row in results.itertuples():
        pixels = np.asarray(Image.open(io.BytesIO(row.image)), dtype=np.float64) / 255
        assert row.edge_energy == pytest.approx(np.square(np.diff(pixels, axis=1)).mean(), abs=2e-3)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for cell, (_, rows) in zip(summary["cells"], results.groupby(["rule", "weights"], sort=False), strict=True):
        assert cell["edge_energy"]["mean"] == pytest.approx(rows["edge_energy"].mean())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt><b>edges</b></dt><dd>Mean squared difference of neighbours</dd>" in page
    assert 'aria-label="weighted gain against edges' in page


def test_the_example_subcommand_is_a_file_and_a_line(tmp_path: Path) -> None:
    """Both are added to a copy of `scripts/cli`, which a process then runs."""
    folder = shutil.copytree(ROOT / "scripts/cli", tmp_path / "cli")
    code, line = (block for block in blocks("CONTRIBUTING.md", "python") if "count" in block)
    (folder / "count.py").write_text(code)
    registry = (folder / "main.py").read_text()
    assert registry.count("COMMANDS = {  # ") == 1
    (folder / "main.py").write_text(re.sub(r"COMMANDS = {.*\n", rf"\g<0>{line}", registry))
    start = f"import stepfuse.scripts.cli as cli; cli.__path__[:] = [{str(folder)!r}]; "
    start += "from stepfuse.scripts.cli.main import main; main()"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True)

    assert "    count     print the number of adapters of a set" in run("--help").stdout.splitlines()
    assert "--at_least N  Fail if the set has fewer adapters (default: 1)." in run("count", "--help").stdout
    assert run("count", "emoji").stdout == "3\n"
    for words, status, error in (
        (("count", "emoji", "--at_least", "4"), 1, "error: set emoji has 3 adapters; expected 4 or more"),
        (("count", "emoji", "--at_least", "0"), 1, "error: --at_least 0; expected 1 or more"),
        (("count", "emoji", "--atleast", "2"), 2, "error: unknown flag --atleast; did you mean '--at_least'?"),
    ):
        done = run(*words)
        assert (done.returncode, done.stdout) == (status, "")
        assert error in done.stderr.splitlines()


def test_the_embedded_base_is_small_enough_to_ship() -> None:
    files = [file for folder in ("pipeline", "clip") for file in (ROOT / "data/emoji-base" / folder).rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 40e6
    assert all(p.dtype == torch.float32 for p in load_pipeline("emoji").unet.parameters())
