"""CONTRIBUTING's example of a variance schedule: stored, trained, put into a set and sampled."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.variance import step_variance
from stepfuse.fuse.rules.schedules import SCHEDULES, schedule_from_dict, schedule_to_dict
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import read_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.fuse.sets.create import create_set
from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DDPOSettings
from tests.fixtures_documents import ROOT, blocks

REWARDS = """
def slope(images, prompts):
    return images[:, 0, :, :8].mean((1, 2)) - images[:, 2, :, 8:].mean((1, 2))
"""


@pytest.fixture
def linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example in a file, and its line in the registry."""
    (code,) = [block for block in blocks("CONTRIBUTING.md", "python") if "class LinearSchedule" in block]
    (line,) = [block for block in blocks("CONTRIBUTING.md", "text") if "LinearSchedule" in block]
    kind, name = re.findall(r'"([^"]+)"', line)
    (tmp_path / "linear_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SCHEDULES, kind, name.replace("stepfuse.fuse.diffusion.linear", "linear_example"))
    return kind


def test_the_example_schedule_is_stored_and_read_back(linear: str) -> None:
    schedule = SCHEDULES[linear](first=1.0, last=0.25)
    path, like = NoisePath.from_scheduler(DDIMScheduler(clip_sample=False)), torch.zeros(1, 1)
    for t, r in ((999, 1.0), (0, 0.25)):
        expected = r * path.ancestral_variance(t, t - 1, like)
        assert step_variance(schedule, path, t, t - 1, like).item() == pytest.approx(expected.item(), rel=1e-6)
    assert schedule_from_dict(schedule_to_dict(schedule)) == schedule


def test_the_example_schedule_is_trained_put_into_a_set_and_sampled(
    linear: str, run_training: Callable, capsys: pytest.CaptureFixture
) -> None:
    command = re.search(r"`train/ddpo.py (--variance .*?)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert command is not None
    _, kind, flag, *options = command[1].split()
    assert (kind, flag) == (linear, "--variance_options")
    Path("linear.yaml").write_text(f"variance_options: {{{', '.join(options).replace('=', ': ')}}}\n")
    run_training("ddpo", config="linear.yaml", variance=kind, max_train_steps=2)
    stored = {"kind": kind, "first": 1.0, "last": 0.2}
    assert schedule_to_dict(read_adapter("out").objective.variance) == stored
    assert parse_settings(DDPOSettings, command[1].split()).variance_options == {"first": 1.0, "last": 0.2}
    create_set("set", ["out"])
    loaded = load_set("set")
    assert schedule_to_dict(loaded.adapters[0].objective.variance) == stored
    sampler = FusedSampler.from_pretrained(loaded)
    latents = sampler.sample(["a cat"], num_inference_steps=2, output_type="latent", progress=False)
    assert isinstance(latents, torch.Tensor)
    assert bool(torch.isfinite(latents).all())


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"first": 1.0}, "Variance relative to ancestral sampling"),
        ({"first": 1.0, "last": 0.0}, "last is 0.0; expected a number in (0, 1]"),
        ({"first": 1.0, "lst": 0.2}, "variance_options has 'lst'; expected first, last"),
    ],
)
def test_options_of_the_example_schedule_are_checked(linear: str, options: dict[str, float], culprit: str) -> None:
    with pytest.raises(ValueError, match=re.escape(culprit)):
        DDPOSettings(variance=linear, variance_options=options)
