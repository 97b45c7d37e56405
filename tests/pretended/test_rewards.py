"""Native rewards on the device: the scores of the CPU, and gradients."""

import pytest
import torch

from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from tests.fixtures_rewards import SMALL, save_small_networks
from tests.pretended.worlds import PROMPTS

PLAIN = ("colourfulness", "compressibility", "incompressibility", "emoji_background", "clip_score")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """How the rewards are loaded, by their own names."""
    root = tmp_path_factory.mktemp("weights")
    save_small_networks(root)
    mixed = "weighted:1*colourfulness/5 + 1*compressibility/1"
    return (
        dict(zip(PLAIN, PLAIN, strict=True)) | {name: f"{name}:{root / name}" for name in SMALL} | {"weighted": mixed}
    )


@pytest.mark.parametrize("name", [*PLAIN, *SMALL, "weighted"])
def test_a_reward_scores_on_the_device_as_on_the_cpu(names, name):
    pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    found = score(load_reward(names[name], "cuda"), pixels.to("cuda"), PROMPTS)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), score(load_reward(names[name]), pixels, PROMPTS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in [*PLAIN, *SMALL] if REWARDS[name].differentiable])
def test_a_gradient_is_on_the_device_and_that_of_the_cpu(names, name):
    gradients = []
    for device in ("cuda", "cpu"):
        pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        load_reward(names[name], device)(pixels, PROMPTS).sum().backward()
        assert pixels.grad.device.type == device
        gradients.append(pixels.grad.cpu())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
