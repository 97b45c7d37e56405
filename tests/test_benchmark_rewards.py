"""The benchmark of rewards, with stand-ins for packages and rewards: what it measures, and in which order."""

import pytest
import torch

from stepfuse.scripts.baselines.originals import start
from stepfuse.scripts.benchmark import checkout, rewards
from stepfuse.scripts.benchmark.rewards import benchmark_rewards, parity_table, reward_table
from stepfuse.scripts.benchmark.settings import RewardBenchmark
from stepfuse.scripts.cli.main import main


class Original:
    """Its first call writes the weights, as the real one's does; the mean of an image's pixels is its score."""

    def __init__(self, folder):
        self.weights, self.calls, self.closed = folder / "weights.pt", [], 0

    def __call__(self, pixels, prompts):
        self.calls.append(len(pixels))
        torch.save(torch.ones(1), self.weights)
        return pixels.mean((1, 2, 3))

    def close(self):
        self.closed += 1


@pytest.fixture
def originals(monkeypatch):
    made = []

    def start_original(name, folder, *, size, threads):
        made.append(Original(folder))
        return made[-1]

    def ours(folder, device, dtype):
        scale = torch.load(folder / "weights.pt")
        layer = torch.nn.Linear(2, 3, bias=False)

        def reward(pixels, prompts):
            layer(torch.zeros(len(pixels), 2))  # 2 × 2 × 3 operations an image
            return scale * pixels.mean((1, 2, 3)) + (0.25 if dtype == torch.bfloat16 else 0)

        return reward

    monkeypatch.setattr(start, "start_original", start_original)
    monkeypatch.setattr(rewards, "OURS", {"hpsv2": ours, "pickscore": ours})
    monkeypatch.setattr(rewards, "_speed_of_products", lambda dtype: 7.0)
    return made


def test_each_reward_is_compared_with_its_original_on_the_weights_that_it_wrote(originals):
    seen = []
    settings = RewardBenchmark(rewards=("hpsv2", "pickscore"), count=5, batch_size=2, repeats=3)
    results = benchmark_rewards(settings, report=lambda results: seen.append(len(results["rows"])))
    assert seen == [1, 2]
    assert [(original.calls, original.closed) for original in originals] == [([1, *[2, 2, 1] * 3], 1)] * 2
    assert results["gflop_per_second"] == {"float32": 7, "bfloat16": 7}
    assert results["settings"]["threads"] == torch.get_num_threads()
    for row in results["rows"]:
        assert (row["images"], len(row["seconds"]), row["gflop_per_image"]) == (5, 3, 12e-9)
        assert row["float32"]["largest_difference"] == 0
        assert row["bfloat16"]["largest_difference"] == pytest.approx(0.25)
        middle = sorted(a / b for a, b in zip(row["seconds"], row["float32"]["seconds"], strict=True))[1]
        assert row["float32"]["ratio"] == middle
        assert row["images_per_second"] == pytest.approx(5 / sorted(row["seconds"])[1])
    assert len(reward_table(results).splitlines()) == len(parity_table(results).splitlines()) == 4


def test_rewards_are_compared_in_a_checkout_only(monkeypatch):
    assert checkout.has_baselines()
    monkeypatch.setattr(checkout, "has_baselines", lambda: False)
    with pytest.raises(SystemExit, match="needs a checkout of the repository"):
        main(["benchmark", "rewards"])
