"""Ours against the packages they come from: both with the same random weights, in the layout that is published.

Each package runs in an environment of its own, as a worker; it makes the weights, and ours load them.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from stepfuse.scripts.baselines.originals.start import start_original
from stepfuse.scripts.benchmark.rewards import OURS
from tests.fixtures_rewards import photographs, save_image_reward, scores_of, small_image_reward

pytestmark = [pytest.mark.originals, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("name", OURS)
def test_scores_of_64_photographs_are_the_originals(name, tmp_path):
    batches = photographs(64)
    original = start_original(name, tmp_path, size="small")
    try:
        expected = scores_of(original, batches)
    finally:
        original.close()
    found = scores_of(OURS[name](tmp_path, torch.device("cpu"), torch.float32), batches)
    assert len(found) == 64
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if name == "image_reward":
        check_committed(tmp_path, expected.tolist())


def check_committed(folder, scores):
    """What is committed of the package, its layout and its scores, is what it says; STEPFUSE_WRITE=1 writes it anew."""
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    said = {
        "layout": {name: list(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()},
        "med_config": json.loads((folder / "med_config.json").read_text()),
        "scores": [round(value, 6) for value in scores],
    }
    if os.environ.get("STEPFUSE_WRITE"):
        (Path(__file__).parent / "published" / "image_reward.json").write_text(json.dumps(said, indent=1) + "\n")
    committed = small_image_reward()
    assert said["layout"] == committed["layout"]
    assert said["med_config"] == committed["med_config"]
    assert said["scores"] == pytest.approx(committed["scores"], abs=1e-4)
    save_image_reward(folder / "again")
    again = torch.load(folder / "again" / "ImageReward.pt", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
