"""What a set may not make anybody run."""

import json
from pathlib import Path

import pytest
import torch

from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.manifest import MANIFEST
from stepfuse.scripts.cli.main import main
from stepfuse.scripts.evaluation.config import EvaluationConfig
from stepfuse.scripts.evaluation.run import evaluate
from tests.fixtures_sampler import PROMPTS, latents
from tests.fixtures_tiny import generators, refused, save_adapter


@pytest.fixture
def booby_trap(small_base, tmp_path):
    """A set whose objective names code that would leave a mark."""
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef reward(images, prompts): ...\n"
    )
    save_adapter(tmp_path / "a", small_base, "a", reward=f"{tmp_path / 'evil.py'}:reward", beta=0.1)
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
def test_a_reward_that_is_a_server_or_a_recipe_is_not_loaded_unasked(small_base, tmp_path, name):
    save_adapter(tmp_path / "a", small_base, "a", reward=name)
    create_set(tmp_path / "set", [tmp_path / "a"])
    with refused("'a'", "trust_rewards=True"):
        FusedSampler.from_pretrained(tmp_path / "set", rule="code")


def test_a_sets_own_rule_and_weights_are_its_default(stranger):
    values = json.loads((stranger / MANIFEST).read_text())
    (stranger / MANIFEST).write_text(json.dumps(values | {"default_rule": "average_noise"}))
    given = FusedSampler.from_pretrained(stranger)
    told = FusedSampler.from_pretrained(stranger, rule="average_noise")
    assert torch.equal(latents(given, PROMPTS), latents(told, PROMPTS))
    assert not torch.equal(latents(given, PROMPTS), latents(told.with_rule("soup"), PROMPTS))
    assert not torch.equal(latents(given, PROMPTS), latents(told.with_rule("product"), PROMPTS))
    (stranger / MANIFEST).write_text(json.dumps(values | {"default_rule": "os.system"}))
    with refused("'os.system'"):
        FusedSampler.from_pretrained(stranger)


def test_a_rule_that_is_a_file_is_not_run_because_a_set_names_it(stranger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('made', 'w').close()\nfrom stepfuse.fuse.rules.averages import Soup as Evil\n")
    values = json.loads((stranger / MANIFEST).read_text())
    (stranger / MANIFEST).write_text(json.dumps(values | {"default_rule": "evil.py:Evil"}))
    with refused("'evil.py:Evil'", "code", "--rule"):
        FusedSampler.from_pretrained(stranger)
    with pytest.raises(SystemExit, match=r"'evil\.py:Evil'"):
        main(["sample", str(stranger), "--prompt", "fox"])
    assert not Path("made").exists()
    assert FusedSampler.from_pretrained(stranger, rule="evil.py:Evil").rule.merges == "weights"
    assert Path("made").exists()
