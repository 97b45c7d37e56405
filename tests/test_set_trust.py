"""What a set may not make anybody run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.manifest import MANIFEST
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.run import evaluate
from tests.fixtures_sampler import PROMPTS, latents, save_set, save_three_adapters
from tests.fixtures_tiny import generators, refused, save_adapter, save_stable_diffusion


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("trust")
    save_set(root / "set", save_three_adapters(root, save_stable_diffusion(root / "base")))
    return root


@pytest.fixture
def mine(root, tmp_path):
    """The set, to be changed."""
    return shutil.copytree(root / "set", tmp_path / "mine")


@pytest.fixture
def booby_trap(root, tmp_path):
    """A set whose objective names code that would leave a mark."""
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef reward(images, prompts): ...\n"
    )
    save_adapter(tmp_path / "a", root / "base", "a", reward=f"{tmp_path / 'evil.py'}:reward", beta=0.1)
    create_set(tmp_path / "trap", [tmp_path / "a"])
    return tmp_path / "trap", mark


def test_a_reward_that_is_code_is_not_loaded_unasked(booby_trap, tmp_path):
    folder, mark = booby_trap
    FusedSampler.from_pretrained(folder).sample(PROMPTS, generator=generators(0, 1), progress=False)
    with refused("evil.py", "--trust_rewards"):
        FusedSampler.from_pretrained(folder, rule="code")
    with refused("evil.py", "--trust_rewards"):
        evaluate(folder, EvaluationConfig(), tmp_path / "evaluation")
    with pytest.raises(SystemExit, match="--trust_rewards"):
        main(["sample", str(folder), *f"--prompt x --rule rgg --output {tmp_path}/x.png --device cpu".split()])
    assert not mark.exists()
    with refused("evil.py"):  # trusted, it is run, and found to give no scores
        FusedSampler.from_pretrained(folder, rule="rgg", trust_rewards=True).sample(PROMPTS, progress=False)
    assert mark.exists()


@pytest.mark.parametrize("name", ["http://127.0.0.1:9", "mine.yaml", "weighted:1*colourfulness/1 + 1*mine.py:f/1"])
def test_a_reward_that_is_a_server_or_a_recipe_is_not_loaded_unasked(root, tmp_path, name):
    save_adapter(tmp_path / "a", root / "base", "a", reward=name)
    create_set(tmp_path / "set", [tmp_path / "a"])
    with refused("'a'", "trust_rewards=True"):
        FusedSampler.from_pretrained(tmp_path / "set", rule="code")


def test_a_sets_own_rule_and_weights_are_its_default(mine):
    values = json.loads((mine / MANIFEST).read_text())
    (mine / MANIFEST).write_text(json.dumps(values | {"default_rule": "average_noise"}))
    given = FusedSampler.from_pretrained(mine)
    told = FusedSampler.from_pretrained(mine, rule="average_noise")
    assert torch.equal(latents(given, PROMPTS), latents(told, PROMPTS))
    (mine / MANIFEST).write_text(json.dumps(values | {"default_rule": "os.system"}))
    with refused("'os.system'"):
        FusedSampler.from_pretrained(mine)


def test_a_rule_that_is_a_file_is_not_run_because_a_set_names_it(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('made', 'w').close()\nfrom stepfuse.fuse.rules.averages import Soup as Evil\n")
    values = json.loads((mine / MANIFEST).read_text())
    (mine / MANIFEST).write_text(json.dumps(values | {"default_rule": "evil.py:Evil"}))
    with refused("'evil.py:Evil'", "code", "--rule"):
        FusedSampler.from_pretrained(mine)
    with pytest.raises(SystemExit, match=r"'evil\.py:Evil'"):
        main(["sample", str(mine), "--prompt", "fox"])
    assert not Path("made").exists()
    assert FusedSampler.from_pretrained(mine, rule="evil.py:Evil").rule.merges == "weights"
    assert Path("made").exists()
