"""Every command and every Python example of README, CONTRIBUTING and docs is run, in small, in the order of its page.

A page is run in a folder where its relative paths lead to something. What cannot be run here is listed in `NOT_RUN`,
with its reason, and still checked by the parser that it is for. A block that nothing covers fails.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from PIL import Image

from stepfuse.data import emoji
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.manifest import EMBEDDED_SETS
from stepfuse.scripts.cli.main import main
from tests.fixtures_documents import DOCUMENTS, ROOT, code_blocks, commands
from tests.fixtures_small_commands import FEWER, Launch, check_command, run_command
from tests.fixtures_tiny import save_adapter

# What is checked and not run, by the beginning of the command, and why.
NOT_RUN = {
    r"scripts/(setup|test)\b": "they make the environment and run the tests",
    r"scripts/docs\b": "tests/test_site.py builds the site",
    r"scripts/release_check\b": "it installs everything anew; tests/test_release.py",
    r"scripts/gpu_check\b": "it needs a GPU; tests/test_gpu_check.py runs it on a pretended one",
    r"source ": "it is the environment that the tests are run in",
    r"pip install ": "nothing is installed while tests run; the names of extras are looked up",
    r"curl ": "tests/test_serving_documents.py has a server, to which it sends them",
    r"python -m (stepfuse\.scripts\.load|tests\.pretended)\.": "half an hour, or a process for the pretended device",
    r"stepfuse demo": "minutes; tests/test_demo.py runs it with --quick",
    r"stepfuse build ": "an hour or two; tests/test_build.py builds a small set",
    r"stepfuse serve ": "it ends when it is stopped; tests/test_serve.py",
    r"stepfuse reward serve ": "it ends when it is stopped; tests/test_reward_server.py",
    r"stepfuse pull ": "it needs a hub; tests/test_publish.py",
    r"stepfuse publish OWNER/NAME --space": "it needs a hub; tests/test_space.py",
    r"stepfuse benchmark .*--(architecture|device cuda)": "published sizes; tests/test_benchmark_architectures.py",
    r"stepfuse benchmark (training|serve) ": "minutes; tests/test_benchmark_training.py, tests/test_benchmark_serve.py",
    r"stepfuse evaluate --world ": "two minutes; tests/test_world.py",
    r"stepfuse evaluate (?!emoji --config eval/emoji )": "the rules of `eval/emoji` are run on docs/how-to/evaluate.md",
    r"accelerate launch .* --reward http:": "it needs the server of the line before; tests/test_reward_server.py",
}
# Blocks that another file of tests runs, with checks of what comes out.
ELSEWHERE = {
    ("CONTRIBUTING.md", "python"): "test_documents.py",
    ("docs/serving.md", "python"): "test_serving_documents.py",
    ("docs/importing-flow-loras.md", "bash"): "test_flow_import.py",  # of LoRAs on the hub
}
ONCE = ("stepfuse evaluate ", "stepfuse benchmark ")  # on the first page that has the command
LANGUAGES = {"bash", "python"}  # these are run
SHOWN = {"", "text", "yaml", "json", "ini", "nginx", "html", "toml", "math", "{math}", "{toctree}", "{eval-rst}"}
PAGES = [page for page in DOCUMENTS if {language for language, _ in code_blocks(page)} & LANGUAGES]


def lines_of(page: str) -> list[str]:
    blocks = code_blocks(page) if (page, "bash") not in ELSEWHERE else []
    return [line for language, code in blocks if language == "bash" for line in commands(code)]


FIRST = {line: page for page in reversed(PAGES) for line in lines_of(page)}


def save_set(folder: Path, objectives: Sequence[Objective], oracles: Sequence[Objective] = (), **options: Any) -> None:
    """Adapters of random weights on the base `emoji`, and their set."""
    for seed, objective in enumerate((*objectives, *oracles)):
        name, reward = objective.name, objective.reward
        save_adapter(folder.parent / name, Path("emoji"), name, seed=seed, reward=reward, **options)
    folders, others = ([folder.parent / objective.name for objective in some] for some in (objectives, oracles))
    create_set(folder, folders, oracles=others, license="apache-2.0", base_license="apache-2.0")


@pytest.fixture(scope="module")
def prepared(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the pages take as given: a set and its adapters, LoRAs as of other tools, images, and an evaluation.

    The bundled base is one of a few thousand random weights here, and the bundled set has such adapters.
    """
    folder, embedded = tmp_path_factory.mktemp("prepared"), load_set("emoji", read_weights=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(emoji.BASES, "emoji", small_base)
        patch.setitem(EMBEDDED_SETS, "emoji", folder / "data/emoji-set")
        oracles = [oracle.adapter.objective for oracle in embedded.oracles]
        save_set(Path("data/emoji-set"), embedded.objectives, oracles, guidance="off")
        chosen = [each for each in embedded.objectives if each.name in ("alignment", "compressibility")]
        save_set(Path("outputs/set"), chosen)
        shutil.copytree("outputs/set", "OWNER/NAME")
        for line in (
            "set profile data/emoji-set --prompts emoji-heldout:1",
            "set export outputs/set alignment --format kohya --output style.safetensors",
            "set export outputs/set compressibility --format peft --output OWNER/LORA",
            "evaluate outputs/set --config evaluation.yaml --output_dir outputs/evaluation",
        ):
            Path("evaluation.yaml").write_text("{prompts: emoji-heldout:2, grid: 1, steps: 1, kl_seeds: 0}")
            main(line.split())
        Path("OWNER/BASE").symlink_to(small_base)
        Path("outputs/images").mkdir()
        for number, colour in enumerate(("red", "gray")):
            Image.new("RGB", (64, 48), colour).save(f"outputs/images/{number}.png")
        Path("DIR").symlink_to("outputs/images")
        Path("prompts.txt").write_text("a red square\na gray square\n")
        yield folder


@pytest.fixture
def desk(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, beside the programs and configurations of the checkout."""
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    for name in ("train", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_examples_of_a_page_run_in_its_order(page: str, desk: Path) -> None:
    names: dict[str, object] = {"__name__": "example"}
    for language, code in code_blocks(page):
        if (page, language) in ELSEWHERE or language not in LANGUAGES:
            continue
        if language == "python":
            if file := re.match(r"# (\w+\.py)\b", code):
                Path(file[1]).write_text(code)
            exec(compile(code, page, "exec"), names)
            continue
        for line in commands(code):
            try:
                do(line, desk, run=not any(re.match(start, line) for start in NOT_RUN) and not is_repeated(line, page))
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page}: {line}") from error


def is_repeated(line: str, page: str) -> bool:
    return line.startswith(ONCE) and FIRST[line] != page


def do(line: str, folder: Path, *, run: bool) -> None:
    """Check a command, and run it."""
    line = re.sub(r'"\$\((python -m [^)]*)\)"', lambda match: shlex.quote(printed(match[1])), line)
    program = shlex.split(line, comments=True)[0]
    RULES[program](line, folder, run)


def printed(line: str) -> str:
    _, *words = shlex.split(line)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout.strip()


def _stepfuse(line: str, folder: Path, run: bool) -> None:
    _, *words = shlex.split(line, comments=True)
    if words[:3] == ["reward", "score", "image_reward"]:  # which would be downloaded
        words[2] = "colourfulness"
    check_command(words)
    if run:
        run_command(words, folder)


def _accelerate(line: str, folder: Path, run: bool) -> None:
    launch = Launch(line)
    assert launch.settings.program
    if run:
        launch.run()


def _pip(line: str, folder: Path, run: bool) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    _, install, *words = shlex.split(line, comments=True)
    assert install == "install"
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--") or before.startswith("--"):  # an option, and its value
            continue
        if word != ".":
            requirement = Requirement(re.sub(r"^\.(?=\[)", "stepfuse", word))  # .[extra] is the checkout's own
            assert requirement.name != "stepfuse" or requirement.extras <= extras.keys(), word


def _python(line: str, folder: Path, run: bool) -> None:
    _, flag, module, *_ = shlex.split(line, comments=True)
    assert flag == "-m"
    assert find_spec(module)
    if module in ("stepfuse.train.dpo", "stepfuse.train.ddpo", "stepfuse.train.distill"):
        _accelerate(line.replace("python -m", "accelerate launch --quiet -m"), folder, run)
        return
    if run:
        assert printed(line)


def _script(line: str, folder: Path, run: bool) -> None:
    script = ROOT / shlex.split(line, comments=True)[0]
    assert os.access(script, os.X_OK)
    assert not run, f"{script.name} is not run in tests"


def _shell(line: str, folder: Path, run: bool) -> None:
    """Of the shell itself; a program in $() is that of this environment."""
    if run:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(["bash", "-euc", line], env=os.environ | {"PATH": path}, check=True)


def _sent(line: str, folder: Path, run: bool) -> None:
    assert not run, "curl needs a server"


RULES: dict[str, Callable[[str, Path, bool], None]] = {
    "stepfuse": _stepfuse,
    "accelerate": _accelerate,
    "pip": _pip,
    "python": _python,
    "source": _shell,
    "eval": _shell,
    "curl": _sent,
    **dict.fromkeys((f"scripts/{name}" for name in ("setup", "test", "docs", "release_check", "gpu_check")), _script),
}


@pytest.mark.slow
def test_the_first_commands_run_as_processes_as_they_stand(desk: Path) -> None:
    """A command and a training of the first page that newcomers read; tests/test_train_layouts.py has train/dpo.py."""
    lines = lines_of("docs/get-started.md")
    command = next(line for line in lines if line.startswith("stepfuse sample "))
    training = Launch(next(line for line in lines if line.startswith("accelerate ") and " -m " in line))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for words in (shlex.split(command, comments=True), training.as_process(desk / "small.yaml")):
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    with Image.open("apple.png") as picture:
        assert picture.size == (256, 256)  # of the bundled base itself, enlarged four times


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_block_has_a_language_that_is_run_or_only_shown(page: str) -> None:
    assert {language for language, _ in code_blocks(page)} <= LANGUAGES | SHOWN


def test_what_is_not_run_or_run_elsewhere_is_still_there() -> None:
    lines = [line for page in PAGES for line in lines_of(page)]
    assert [start for start in NOT_RUN if not any(re.match(start, line) for line in lines)] == []
    for reason in NOT_RUN.values():
        assert [name for name in re.findall(r"tests/\w+\.py", reason) if not (ROOT / name).is_file()] == []
    for (page, language), file in ELSEWHERE.items():
        assert any(written == language for written, _ in code_blocks(page))
        assert page in (ROOT / "tests" / file).read_text()
    assert all(any(line.startswith(f"stepfuse {start}") for line in lines) for start in FEWER)
