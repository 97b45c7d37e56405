"""Commands and the pipeline on the device."""

import shutil

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from stepfuse.fuse.sampling.pipeline import FusedPipeline
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.cli.main import main
from tests.pretended.worlds import PROMPTS, SCALES

WEIGHTS = {"a": 0.5, "b": 0.5}


def run(*arguments):
    main([*map(str, arguments), "--device", "cuda"])


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path


def test_sample_draws_what_it_draws_on_the_cpu(world, desk):
    command = ["sample", world, "--prompt", PROMPTS[0], "--weights", "a=0.5,b=0.5", "--steps", 2]
    run(*command, "--output", "device.png")
    main([*map(str, command), "--output", "host.png", "--device", "cpu"])
    device, host = Image.open("device.png"), Image.open("host.png")
    assert device.size == (16, 16)
    difference = max(abs(a - b) for a, b in zip(device.tobytes(), host.tobytes(), strict=True))
    assert difference <= 1  # of 255


def test_set_profile_measures(world, desk):
    shutil.copytree(world, "set")
    run("set", "profile", "set", "--prompts", "prompts.txt", "--steps", 2)
    (profile,) = load_set(desk / "set").profiles
    assert profile.num_inference_steps == 2


def test_evaluate_measures_every_cell(world, desk):
    config = dict(prompts="prompts.txt", seeds_per_prompt=1, grid=1, rules=["product", "soup"], steps=2, scales=SCALES)
    (desk / "config.yaml").write_text(yaml.safe_dump(config | {"rewards": ["emoji_background"], "batch_size": 4}))
    run("evaluate", world, "--config", "config.yaml", "--output_dir", "evaluation")
    frame = pd.read_parquet("evaluation/results.parquet")
    assert set(frame["rule"]) == {"base", "product", "soup"}
    assert frame["reward_emoji_background"].notna().all()


def test_score_writes_what_it_writes_on_the_cpu(desk):
    (desk / "images").mkdir()
    for colour in ("red", "orange"):
        Image.linear_gradient("L").convert("RGB").save(f"images/{colour}.png")
    command = ["reward", "score", "colourfulness", "--images", "images", "--prompts", "prompts.txt"]
    run(*command, "--output", "device.csv")
    main([*command, "--output", "host.csv", "--device", "cpu"])
    assert (desk / "device.csv").read_text() == (desk / "host.csv").read_text()


@pytest.fixture(scope="module")
def images(world):
    """What the pipeline draws on the CPU."""
    return pixels(FusedPipeline.from_pretrained(world))


def pixels(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(PROMPTS, WEIGHTS, num_inference_steps=2, generator=generators, output_type="pt").images


def test_a_pipeline_moves_to_the_device_and_back(world, images):
    pipe = FusedPipeline.from_pretrained(world).to("cuda")
    assert pipe.device.type == "cuda"
    torch.testing.assert_close(pixels(pipe), images, rtol=0, atol=1e-5)
    assert pipe.to("cpu").device.type == "cpu"
    torch.testing.assert_close(pixels(pipe), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_an_offloaded_pipeline_draws_the_same(world, images, offload):
    pipe = FusedPipeline.from_pretrained(world)
    getattr(pipe, offload)()
    torch.testing.assert_close(pixels(pipe), images, rtol=0, atol=1e-5)
