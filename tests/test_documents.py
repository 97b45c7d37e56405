"""The commands and examples that README and CONTRIBUTING show are run here as they stand, on the embedded base."""

import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stepfuse.configs import FOLDER
from stepfuse.data.settings_file import find_config
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.rules.weights import Weights
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.rewards import catalogue
from stepfuse.rewards.registry import load_reward
from stepfuse.scripts.cli.main import main, parse
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.metrics import METRICS
from stepfuse.scripts.evaluation.run import evaluate
from tests.fixtures_documents import ROOT, blocks
from tests.fixtures_tiny import save_adapter, save_stable_diffusion

# SD 1.5 needs the hub and a GPU: the commands are the README's, these flags only make the run small.
SMALL = (
    "--pretrained_model_name_or_path emoji --dataset_name= --prompts emoji --max_train_steps 1 --train_batch_size 2 "
    "--gradient_accumulation_steps 1 --sample_num_steps 3 --num_validation_images 1 --gradient_checkpointing false "
    "--reward compressibility"
)
SMALLER = {
    "stepfuse.train.dpo": f"{SMALL} --skip_first_steps 0",
    "stepfuse.train.ddpo": f"{SMALL} --num_generations 2",
    "benchmark": "--adapters 1,2 --images 1 --steps 1 --repeats 1 --no_memory",
    "--gate": "--output gate.png",
    "--space": "--dry_run",  # tests/test_space.py has a hub to publish to
}


def lines_of(part: str) -> list[str]:
    """The commands of the README's one block of bash that mentions `part`."""
    (block,) = [block for block in blocks("README.md", "bash") if part in block]
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def example(part: str) -> dict[str, object]:
    """The names that the CONTRIBUTING example mentioning `part` defines."""
    (code,) = [block for block in blocks("CONTRIBUTING.md", "python") if part in block]
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder where the README's relative paths lead to the checkout's files, and outputs land outside it."""
    for name in ("train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
def test_the_readme_commands_run_as_they_stand(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, another, shown, explained = lines_of("stepfuse set show emoji")
    # Those of other sets and the hub: test_set_exchange.py and test_publish.py. No evaluation was made here.
    ours = [
        line.replace("--evaluation outputs/evaluation", "")
        for line in lines_of("stepfuse set export")
        if " outputs/set " in line
    ]
    assert len(ours) == 5
    (snippet,) = blocks("README.md", "python")
    here = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{here}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    written = [first, *lines_of("stepfuse set create"), *lines_of("stepfuse reward list")]
    written += [*lines_of("stepfuse benchmark emoji"), *lines_of("stepfuse set profile")]
    # Random weights of Stable Diffusion 1.5 want a GPU; tests/test_benchmark.py holds them to the published number.
    lines = [line for line in written if "--architecture sd15" not in line]
    assert len(lines) == 1 + 6 + 2 + 1 + 2
    (checkout / "outputs" / "images").mkdir(parents=True)
    for number, colour in enumerate(("red", "gray")):
        Image.new("RGB", (64, 48), colour).save(checkout / "outputs" / "images" / f"{number}.png")
    (checkout / "prompts.txt").write_text("a red square\na gray square\n")
    monkeypatch.chdir(checkout)
    for line in (*lines, another, shown, *ours):
        words = shlex.split(line, comments=True)
        words += shlex.split(next((extra for program, extra in SMALLER.items() if program in words), ""))
        if words[0] == "stepfuse" and line != first:  # in this process, which has torch already
            main(words[1:])
            continue
        assert shutil.which(words[0], path=environment["PATH"]), words[0]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(explained, comments=True)[1:])
    assert stop.value.code == 0
    with Image.open(checkout / "out.png") as picture:
        assert picture.size == (64, 64)
    assert (checkout / "scores.csv").read_text().splitlines()[2].startswith("1.png,a gray square,")
    assert (checkout / "best.png").is_file()
    for name in ("alignment.safetensors", "lora.safetensors", "outputs/set/README.md"):
        assert (checkout / name).is_file()
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(64, 64)] * 3


@pytest.mark.slow
def test_the_readme_evaluation_runs_in_small(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own command and config, every rule and weight of it, with fewer prompts, seeds and steps."""
    words, _ = (shlex.split(line, comments=True) for line in lines_of("stepfuse evaluate emoji"))
    place = words.index("--config") + 1
    settings = yaml.safe_load(find_config(words[place], "eval").read_text())
    settings |= {"prompts": "emoji-heldout:2", "seeds_per_prompt": 2, "steps": 2, "strip_prompts": 1, "kl_seeds": 0}
    (code,) = [rule for rule in settings["rules"] if isinstance(rule, dict) and rule["rule"] == "code"]
    code |= {"candidates": 2, "block_size": 1}
    words[place] = str(checkout / "small.yaml")
    (checkout / "small.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(checkout)
    assert words[0] == "stepfuse"
    main(words[1:])  # in this process, which has torch already
    output = checkout / words[words.index("--output_dir") + 1]
    assert {"report.html", "fronts.png", "summary.json", "results.parquet"} <= {file.name for file in output.iterdir()}
    assert set(json.loads((output / "summary.json").read_text())["rules"]) >= set(RULES)


def test_the_readme_names_configurations_that_are_packaged() -> None:
    """A name, and not only a path, after every --config and build; the folder says which program reads it."""
    written = shlex.split("\n".join(blocks("README.md", "bash")), comments=True)
    named = [word for before, word in itertools.pairwise(written) if before in ("--config", "build")]
    assert len(named) >= 6
    for name in named:
        assert find_config(name, name.split("/")[0]).parent.parent == FOLDER


def test_every_stepfuse_command_of_the_readme_is_parsed() -> None:
    lines = [line for block in blocks("README.md", "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("stepfuse ")]
    assert len(commands) > 20
    for _, *arguments in commands:
        if arguments[-1] != "--help":
            assert callable(parse(arguments).run)


def test_the_readme_says_how_to_install_before_the_first_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("scripts/setup") < text.index("source .venv/bin/activate") < text.index("stepfuse sample emoji")
    assert text.index("pip install torch") < text.index("pip install .") < text.index("stepfuse sample emoji")


def test_the_readme_tree_names_what_is_there() -> None:
    (tree,) = [block for block in blocks("README.md", "text") if "train/" in block]
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
        with Image.open(ROOT / place) as picture:
            picture.verify()


def test_links_within_the_documents_lead_to_files() -> None:
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    documents += sorted((ROOT / "docs").rglob("*.md"))
    links = [
        (document.relative_to(ROOT).as_posix(), link)
        for document in documents
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) > 20
    assert [(document, link) for document, link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


def test_the_example_reward_is_loaded_and_listed_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [block for block in blocks("CONTRIBUTING.md", "python") if "brightness" in block]
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
    assert re.search(r"^brightness +yes +.*ITU-R BT.601", capsys.readouterr().out, re.MULTILINE)


def test_the_example_rule_works_by_name_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sampling, evaluation and benchmark; by name with the line that CONTRIBUTING adds to the registry."""
    (line,) = re.findall(r'"strongest": "(stepfuse\.[\w.]+:\w+)"', (ROOT / "CONTRIBUTING.md").read_text())
    name = line.partition(":")[0]
    module = ModuleType(name)
    vars(module).update(example("class Strongest"))
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
    (code,) = [block for block in blocks("CONTRIBUTING.md", "python") if "class Strongest" in block]
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
