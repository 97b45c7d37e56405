"""The precision of rewards, by one option of every command that runs them."""

import pytest
import torch

from stepfuse.data import emoji
from stepfuse.rewards.registry import check_reward_dtype
from stepfuse.scripts.cli.main import main
from stepfuse.train.provenance import provenance
from stepfuse.train.scoring import TrainingReward
from stepfuse.train.settings import DDPOSettings
from tests.fixtures_tiny import refused

CLIP = f"clip_score:{emoji.CLIP}"


def test_training_loads_the_networks_of_rewards_in_their_precision():
    settings = DDPOSettings(reward=f"weighted:1*{CLIP}/6 + 1*colourfulness/5", reward_dtype="bfloat16")
    reward = TrainingReward(settings)
    network, _ = reward.objectives[0].reward.rewards.values()
    assert network.model.dtype == torch.bfloat16
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = reward.unshaped(pixels, ["a cat", "a dog"])
    reward.close()
    full = TrainingReward(DDPOSettings(reward=settings.reward))
    torch.testing.assert_close(found, full.unshaped(pixels, ["a cat", "a dog"]), rtol=0.02, atol=0.02)
    full.close()
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "culprits"),
    [
        (["colourfulness"], ["'colourfulness'", "no network"]),
        (["colourfulness", "weighted:1*compressibility + 1*colourfulness"], ["'compressibility'", "no network"]),
        (["hpsv3", CLIP], ["'hpsv3'", "a worker"]),
        ([CLIP, "mine.py:function"], ["'mine.py:function'", "a function"]),
        (["mine.yaml"], ["'mine.yaml'", "states dtype itself"]),
        (["http://127.0.0.1:8765"], ["'http://127.0.0.1:8765'", "a server"]),
        (["ocr"], ["'ocr'", "no network"]),
    ],
    ids=["native", "sum", "worker", "function", "file", "server", "ocr"],
)
def test_a_reward_that_cannot_is_refused(names, culprits):
    check_reward_dtype(names, torch.float32)
    with refused("reward_dtype float16", *culprits):
        check_reward_dtype(names, torch.float16)


def test_rewards_without_networks_may_stand_beside_one_with():
    check_reward_dtype(["colourfulness", CLIP], torch.bfloat16)


@pytest.mark.parametrize(
    "command",
    [
        "sample emoji --prompt x --rule code --output {0}/a.png",
        "evaluate emoji --config {0}/config.yaml --output_dir {0}/out",
        "reward score compressibility --images {0} --prompts {0}/prompts.txt --output {0}/scores.csv",
        "reward serve compressibility --port 0",
    ],
    ids=["sample", "evaluate", "score", "serve"],
)
def test_commands_take_it(tmp_path, monkeypatch, command):
    """The names of what is to be scored reach the check, and its error the command line."""

    def refuse(names, dtype):
        raise ValueError(f"{list(names)} in {dtype}")

    for module in ("scripts.evaluation.prepare", "fuse.sampling.sampler", "scripts.recipes.rewards"):
        monkeypatch.setattr(f"stepfuse.{module}.check_reward_dtype", refuse)
    (tmp_path / "config.yaml").write_text("rules: [base]\n")
    (tmp_path / "prompts.txt").write_text("x\n")
    with pytest.raises(SystemExit) as exited:
        main([*command.format(tmp_path).split(), "--reward_dtype", "bfloat16"])
    assert "compressibility" in exited.value.code
    assert exited.value.code.endswith("in torch.bfloat16")


def test_an_adapter_records_it_and_keeps_its_hash_without():
    """The hash of a run in float32 is that of versions that did not have the setting."""
    changes = ({}, {"decode_batch_size": 3}, {"reward_dtype": "bfloat16"})
    plain, sliced, reduced = (provenance(DDPOSettings(reward=CLIP, **each)) for each in changes)
    assert reduced["config"]["reward_dtype"] == "bfloat16"
    assert plain["config_sha256"] == sliced["config_sha256"] != reduced["config_sha256"]
