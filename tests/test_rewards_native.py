"""ImageReward, PickScore, HPSv2 and the aesthetic predictor, on small random models in their published layouts."""

import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from stepfuse.rewards.hpsv2 import clean_prompt
from stepfuse.rewards.image_reward import load_tokenizer
from stepfuse.rewards.registry import load_reward
from tests.fixtures_rewards import (
    SMALL,
    photographs,
    save_clip,
    save_hpsv2,
    save_image_reward,
    save_small_networks,
    scores_of,
    small_image_reward,
)
from tests.fixtures_tiny import refused


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a reward, with what `NAME:FOLDER` reads."""
    root = tmp_path_factory.mktemp("weights")
    save_small_networks(root)
    save_hpsv2(root / "hpsv2", "HPS_v2.1_compressed.pt")
    return root


@pytest.fixture(scope="module")
def rewards(folders):
    return {name: load_reward(f"{name}:{folders / name}") for name in SMALL}


# Scores.


def test_image_reward_scores_photographs_as_its_package_does(rewards):
    found = scores_of(rewards["image_reward"], photographs(64))
    expected = torch.tensor(small_image_reward()["scores"])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_pickscore_is_that_of_its_readme_on_transformers(folders, rewards):
    """Its own processor and CLIPModel, one pair at a time: exp(scale) · cos."""
    folder = folders / "pickscore"
    model, tokenizer = rewards["pickscore"].model, CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    for pixels, prompts in photographs(24):
        found = rewards["pickscore"](pixels, prompts)
        for i, prompt in enumerate(prompts):
            picture = Image.fromarray((pixels[i] * 255).round().byte().permute(1, 2, 0).numpy())
            tokens = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
            with torch.no_grad():
                output = model(**processor(picture, return_tensors="pt"), **tokens)
            assert found[i].item() == pytest.approx(output.logits_per_image.item(), abs=1e-4)


def test_the_aesthetic_predictor_is_its_layers_on_the_unit_vector_of_clip(folders, rewards):
    state = torch.load(folders / "laion_aesthetic" / "aesthetic-model.pth")
    # As improved-aesthetic-predictor writes it: dropouts between the layers, which do nothing in evaluation.
    module = nn.Module()
    module.layers = nn.Sequential(
        nn.Linear(48, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    module.load_state_dict(state)
    clip = load_reward(f"pickscore:{folders / 'laion_aesthetic'}")
    for pixels, prompts in photographs(16):
        expected = module.eval().layers(clip.embed_images(pixels))[:, 0]
        torch.testing.assert_close(rewards["laion_aesthetic"](pixels, prompts), expected)


def test_the_prompt_does_not_count_for_the_aesthetic_predictor_alone(rewards):
    (pixels, prompts), *_ = photographs(8)
    for name, reward in rewards.items():
        other = reward(pixels, ["something else"] * 8)
        assert torch.equal(reward(pixels, prompts), other) == (name == "laion_aesthetic")


def test_versions_of_hpsv2_read_their_own_file(folders):
    (pixels, prompts), *_ = photographs(8)
    first, second = (load_reward(f"{name}:{folders / 'hpsv2'}") for name in ("hpsv2", "hpsv2.1"))
    assert torch.equal(first(pixels, prompts), second(pixels, prompts))  # the same weights under both names
    (folders / "hpsv2" / "HPS_v2.1_compressed.pt").rename(folders / "hpsv2" / "aside.pt")
    try:
        with refused("HPS_v2.1_compressed.pt", str(folders / "hpsv2")):
            load_reward(f"hpsv2.1:{folders / 'hpsv2'}")
    finally:
        (folders / "hpsv2" / "aside.pt").rename(folders / "hpsv2" / "HPS_v2.1_compressed.pt")


@pytest.mark.parametrize("name", SMALL)
def test_scores_do_not_depend_on_the_batch_and_keep_their_order(name, folders):
    (pixels, prompts), *_ = photographs(8)
    one = load_reward(f"{name}:{folders / name}")
    one.batch_size = 3
    threes = one(pixels, prompts)
    alone = torch.cat([one(image[None], [prompt]) for image, prompt in zip(pixels, prompts, strict=True)])
    torch.testing.assert_close(threes, alone, rtol=0, atol=1e-4)
    assert len(set(threes.tolist())) == 8


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_of_the_networks_alone(name, folders, rewards):
    (pixels, prompts), *_ = photographs(8)
    reduced = load_reward(f"{name}:{folders / name}", dtype=torch.bfloat16)
    half, full = reduced(pixels, prompts), rewards[name](pixels, prompts)
    if name == "pickscore":  # a factor of all scores: in bfloat16 it would be off by up to half a percent
        assert reduced.factor == rewards[name].factor
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).abs().max() < 0.1 * full.abs().max()


# Gradients.


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 64), (40, 56)], ids=["square", "wide"])
def test_gradients_are_the_slopes_of_central_differences(name, size, rewards):
    generator = torch.Generator().manual_seed(0)
    coarse = 0.25 + 0.5 * torch.rand(2, 3, 5, 5, generator=generator)  # away from 0 and 1, where resizing clamps
    images = functional.interpolate(coarse, size=size, mode="bilinear")
    prompts = ["a red apple", "a fox on a green background"]
    pixels = images.clone().requires_grad_(True)
    values = rewards[name](pixels, prompts)
    (gradient,) = torch.autograd.grad(values.sum(), pixels)
    direction = torch.randn(images.shape, generator=generator)
    unit = [d / d.flatten(1).norm(dim=1)[:, None, None, None] for d in (direction, gradient)]
    direction = (unit[0] + unit[1]) / 2
    # A gradient is asked for throughout: without one, pixels are rounded to bytes as the originals do.
    ahead, back = (
        rewards[name]((images + step * direction).requires_grad_(True), prompts).detach() for step in (3e-2, -3e-2)
    )
    slope = (ahead - back) / 6e-2
    torch.testing.assert_close(slope, (gradient * direction).flatten(1).sum(1), rtol=3e-2, atol=0)
    assert (gradient != 0).float().mean() > 0.5  # what is cropped away counts for nothing


@pytest.mark.parametrize("name", SMALL)
def test_the_smooth_way_is_close_to_the_exact_one(name, rewards):
    for pixels, prompts in photographs(32):
        exact = rewards[name](pixels, prompts)
        smooth = rewards[name](pixels.clone().requires_grad_(True), prompts).detach()
        assert (exact - smooth).abs().max() < 0.05 * exact.std() + 1e-4


# Texts.


def test_the_tokenizer_of_image_reward_is_that_of_bert():
    tokenizer = load_tokenizer()
    assert len(tokenizer) == 30524
    # Of bert-base-uncased: [CLS] 101, [SEP] 102, [PAD] 0; "hello" 7592, "world" 2088, "," 1010
    assert tokenizer("Hello, World").input_ids == [101, 7592, 1010, 2088, 102]


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A  Fox\n", "a fox"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("“curly” quotes’", '"curly" quotes\''),
        ("cafÃ©", "café"),  # UTF-8 read as Latin-1
        ("日本語 の 文", "日本語 の 文"),
        ("", ""),
    ],
)
def test_hpsv2_mends_prompts_as_open_clip_does(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


# Files.


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb-went-off",)


def damaged(file, how):
    """The same file, broken."""
    data = file.read_bytes()
    if how == "cut off":
        file.write_bytes(data[: len(data) // 2])
    elif how == "noise":
        file.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "code":
        torch.save({"state": Bomb()}, file)
    elif how == "plain pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    else:
        state = torch.load(file)
        inner = state.get("state_dict", state)
        name = next(n for n, v in inner.items() if v.ndim == 2)
        if how == "missing":
            del inner[name]
        elif how == "shape":
            inner[name] = inner[name][:-1]
        elif how == "not finite":
            inner[name][0, 0] = float("nan")
        elif how == "superfluous":
            inner["visual.junk" if "visual.proj" in inner else "blip.visual_encoder.junk"] = torch.zeros(2)
        elif how == "no tensors":
            state = OrderedDict(model=3)
        torch.save(state, file)


@pytest.mark.parametrize(
    "how",
    [
        *("cut off", "noise", "empty", "code", "plain pickle", "missing", "shape", "not finite"),
        *("superfluous", "no tensors"),
    ],
)
@pytest.mark.parametrize("name", ["image_reward", "hpsv2"])
def test_a_corrupt_checkpoint_is_refused_by_name(name, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save = {"image_reward": save_image_reward, "hpsv2": save_hpsv2}[name]
    save(tmp_path)
    (file,) = tmp_path.glob("*.pt")
    damaged(file, how)
    with refused(file.name):
        load_reward(f"{name}:{tmp_path}")
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("how", ["missing", "superfluous", "bias", "width"])
def test_a_head_of_another_layout_is_refused_by_name(how, folders, tmp_path):
    state = torch.load(folders / "laion_aesthetic" / "aesthetic-model.pth")
    if how == "missing":
        del state["layers.4.weight"]
    elif how == "superfluous":
        state["layers.8.weight"] = torch.zeros(1, 1)
    elif how == "bias":
        state["layers.2.bias"] = torch.zeros(7)
    else:  # of the third layer, which no longer fits the second
        state["layers.4.weight"] = torch.zeros(64, 7)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(folders / "laion_aesthetic" / file)
    torch.save(state, tmp_path / "aesthetic-model.pth")
    with refused("aesthetic-model.pth", "head"):
        load_reward(f"laion_aesthetic:{tmp_path}")


@pytest.mark.parametrize("name", SMALL)
def test_a_file_that_a_folder_lacks_is_named_with_its_address(name, tmp_path):
    with refused(str(tmp_path), "https://huggingface.co/", "/resolve/"):
        load_reward(f"{name}:{tmp_path}")


@pytest.mark.parametrize("file", ["med_config.json", "config.json", "tokenizer.json"])
def test_a_corrupt_configuration_is_refused_by_name(file, tmp_path):
    name = "image_reward" if file == "med_config.json" else "pickscore"
    (save_image_reward if name == "image_reward" else save_clip)(tmp_path)
    for text in ("{", "[]", "\x00"):
        (tmp_path / file).write_text(text)
        with refused(file):
            load_reward(f"{name}:{tmp_path}")


@pytest.mark.parametrize("offline", [True, False], ids=["told so", "unreachable"])
def test_without_a_network_and_with_an_empty_cache_it_says_what_to_download_and_where_to_put_it(offline, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    environment.pop("HF_HUB_OFFLINE", None)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    code = "from stepfuse.rewards.registry import load_reward; load_reward('pickscore')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    said = done.stderr.strip().splitlines()[-1]
    commands = re.findall(r"hf download (\S+) (\S+) --revision ([0-9a-f]{40}) --local-dir DIR", said)
    assert [file for _, file, _ in commands] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert commands[1][0] == "yuvalkirstain/PickScore_v1"
    assert "pickscore:DIR" in said
    assert said.startswith("ValueError: ")


def test_a_download_that_is_not_what_was_published_is_refused(tmp_path, monkeypatch):
    """A file in the hub's cache under its published commit, whose bytes were changed."""
    from stepfuse.rewards.image_reward import CHECKPOINT

    folder = tmp_path / "models--THUDM--ImageReward"
    (folder / "snapshots" / CHECKPOINT.revision).mkdir(parents=True)
    (folder / "blobs").mkdir()
    blob = folder / "blobs" / CHECKPOINT.sha256
    blob.write_bytes(b"something else")
    (folder / "snapshots" / CHECKPOINT.revision / CHECKPOINT.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("stepfuse.rewards.published.hf_hub_download", _cached(tmp_path))
    with refused("sha256", str(blob)):
        load_reward("image_reward")


def _cached(folder):
    import huggingface_hub

    def download(repo, name, revision):
        return huggingface_hub.hf_hub_download(repo, name, revision=revision, cache_dir=folder, local_files_only=True)

    return download
