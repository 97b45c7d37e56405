"""What earlier versions wrote is read, resumed and drawn again: tests/reference, made before folders were moved.

Latents of the bundled set by `python -m tests.fixtures_reference`; `dpo` and `ddpo` by the commands below, run whole,
of which a checkpoint and the final adapter were kept; `set` of both adapters by `create_set`.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.train.checkpoints import read_state
from stepfuse.train.provenance import config_hash
from stepfuse.train.settings import DDPOSettings, DPOSettings
from tests.fixtures_reference import CASES, FILE, draw, processor, read, sha256
from tests.fixtures_training import save_tiny_pipeline, train_here
from tests.test_train_command import DDPO, DPO, PROMPTS, SLOPE

REFERENCE = FILE.parent


@pytest.mark.parametrize("case", CASES)
def test_rules_draw_a_set_as_before(case: str) -> None:
    latents, hashes, drawn_by = read()
    found = draw(case)
    if drawn_by == processor():
        assert sha256(found) == hashes[case]
    torch.testing.assert_close(found, latents[case], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    save_tiny_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "slope.py").write_text(SLOPE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "settings", "options"), [("dpo", DPO, {}), ("ddpo", DDPO, {"objective_name": "slope2"})]
)
def test_a_checkpoint_of_before_is_resumed_to_the_adapter_of_before(
    desk: Path, algorithm: str, settings: dict, options: dict
) -> None:
    shutil.copytree(REFERENCE / algorithm, desk / algorithm, ignore=shutil.ignore_patterns("*.json", "*.safetensors"))
    for kept in (REFERENCE / algorithm).glob("checkpoint-*"):
        shutil.copytree(kept, desk / algorithm / kept.name, dirs_exist_ok=True)
    options = options | {"train_batch_size": 8, "resume_from_checkpoint": "latest"}
    folder = train_here(desk, algorithm, settings, algorithm, **options)
    weights = "pytorch_lora_weights.safetensors"
    expected, found = (read_state(parent / weights) for parent in (REFERENCE / algorithm, folder))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
    before, after = read_adapter(REFERENCE / algorithm), read_adapter(folder)
    assert (before.objective.name, before.objective.beta) == (after.objective.name, after.objective.beta)
    assert before.record["steps"] == after.record["steps"]


def test_a_set_of_before_is_loaded_and_fused(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)  # where its base lies
    loaded = load_set(REFERENCE / "set")
    assert loaded.names == ["slope", "slope2"]
    sampler = FusedSampler.from_pretrained(loaded)
    weights = {"slope": 0.5, "slope2": 0.5}
    latents = sampler.sample(["a cat"], weights, num_inference_steps=2, output_type="latent", progress=False)
    assert isinstance(latents, torch.Tensor)
    assert bool(torch.isfinite(latents).all())


@pytest.mark.parametrize(("algorithm", "settings"), [("dpo", DPOSettings), ("ddpo", DDPOSettings)])
def test_settings_that_there_were_not_before_leave_the_hash_of_a_run(
    desk: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, settings: type[DPOSettings] | type[DDPOSettings]
) -> None:
    """So that a build does not train an adapter again."""
    monkeypatch.chdir(desk)
    record = read_adapter(REFERENCE / algorithm).record
    assert "skip_last_steps" not in record["config"]
    run = settings(**record["config"])
    assert config_hash(run) == record["config_sha256"]
    assert config_hash(replace(run, skip_last_steps=1)) != record["config_sha256"]
    unset = replace(run, lora_target_modules=None)
    assert config_hash(unset) == config_hash(replace(run, lora_target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
