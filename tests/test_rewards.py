"""Rewards against PIL, hand arithmetic and transformers' own CLIP."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.clip_score import clip_score
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.rewards.compressibility import compressibility, incompressibility
from stepfuse.rewards.contrast import contrast
from stepfuse.rewards.emoji_background import emoji_background
from stepfuse.rewards.lightness import lightness
from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.subject_size import subject_size
from stepfuse.rewards.symmetry import symmetry
from stepfuse.rewards.warmth import warmth
from tests.fixtures_tiny import refused

PROMPTS = ["a red apple on a blue background", "a fox on a green background", "a dog on a red background"]
# Of OpenAI's CLIP: huggingface.co/openai/clip-vit-base-patch32, preprocessor_config.json
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def smooth_images(height, width, count=3, seed=0):
    """Uint8 pictures (count, height, width, 3) that are neither flat nor noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse])


def pixels_of(arrays):
    return torch.tensor(arrays.transpose(0, 3, 1, 2), dtype=torch.float32) / 255


def solid(*colours):
    """One image a colour, each with as many columns as it has entries of (r, g, b), on 0 to 255."""
    return torch.tensor(colours, dtype=torch.float32).permute(0, 2, 1)[:, :, None, :].expand(-1, -1, 4, -1) / 255


def directional_derivative(reward, images, prompts, direction, step):
    """Central differences of the scores along one direction an image."""
    return (reward(images + step * direction, prompts) - reward(images - step * direction, prompts)) / (2 * step)


def assert_gradient_is_the_slope(reward, images, prompts, step, tolerance):
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    direction /= direction.flatten(1).norm(dim=1)[:, None, None, None]
    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(pixels, prompts).sum(), pixels)
    # Half the way along the gradient itself, for a random direction is nearly orthogonal to it.
    ahead = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    direction = (direction + ahead) / 2
    with torch.no_grad():
        slope = directional_derivative(reward, images, prompts, direction, step)
    expected = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, expected, rtol=tolerance, atol=0)
    assert (gradient != 0).float().mean() > 0.99


# JPEG.


def test_compressibility_is_minus_the_kilobytes_that_pil_writes_at_quality_95():
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3), dtype=np.uint8)
    arrays = np.concatenate([noise, np.full_like(noise, 128), smooth_images(40, 56, count=2)])
    sizes = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    assert max(sizes) > 3 * min(sizes)
    expected = torch.tensor(sizes) / 1000
    prompts = [""] * 4
    assert torch.equal(compressibility(pixels_of(arrays), prompts), -expected)
    assert torch.equal(incompressibility(pixels_of(arrays), prompts), expected)


# Colourfulness.


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([(255, 0, 0), (0, 255, 0)], 255 + 0.3 * 127.5),  # rg = ±255, yb = 127.5 in both halves
        ([(0, 0, 255), (0, 0, 255)], 0.3 * 255),  # yb = -255 everywhere
        ([(200, 200, 200), (10, 10, 10)], 0),
        # rg = 100, 20: mean 60, variance 40²; yb = 150 - 60, 50 - 0: mean 70, variance 20²
        ([(200, 100, 60), (60, 40, 0)], (40**2 + 20**2) ** 0.5 + 0.3 * (60**2 + 70**2) ** 0.5),
    ],
    ids=["red and green", "blue", "greys", "browns"],
)
def test_colourfulness_is_that_of_the_paper(columns, expected):
    """M = sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²), rg = R - G, yb = (R + G)/2 - B (Hasler and Süsstrunk)."""
    assert colourfulness(solid(columns), [""]).item() == pytest.approx(expected, abs=1e-4)


def test_colourfulness_of_a_batch_is_that_of_each_image():
    images = pixels_of(smooth_images(12, 20))
    alone = torch.cat([colourfulness(image[None], [""]) for image in images])
    torch.testing.assert_close(colourfulness(images, [""] * 3), alone)


def test_the_gradient_of_colourfulness_is_its_slope():
    images = pixels_of(smooth_images(12, 20))
    assert_gradient_is_the_slope(colourfulness, images, [""] * 3, step=1e-2, tolerance=1e-3)


def test_a_grey_image_has_no_gradient_of_colourfulness_rather_than_nan():
    pixels = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(colourfulness(pixels, [""]).sum(), pixels)
    assert not gradient.any()


# CLIP.


@pytest.fixture(scope="module")
def emoji_clip():
    return clip_score()


def clip_by_transformers(arrays, prompts):
    """100 cos(image, text) from the forward of the whole model, on pictures that PIL has resized."""
    model = CLIPModel.from_pretrained(emoji.CLIP, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(emoji.CLIP)
    side = model.config.vision_config.image_size
    prepared = []
    for array in arrays:
        height, width = array.shape[:2]
        short = min(height, width)
        size = (side * width // short, side * height // short)  # CLIPImageProcessor rounds down
        channels = [  # as floats: PIL would round to whole values
            np.asarray(Image.fromarray(array[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        resized = np.stack(channels, -1).clip(0, 255)[top : top + side, left : left + side]
        prepared.append((resized / 255 - MEAN) / STD)
    tokens = tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    pixel_values = torch.tensor(np.stack(prepared).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        output = model(pixel_values=pixel_values, **tokens)
    return (output.logits_per_image / model.logit_scale.exp() * 100).diagonal()


@pytest.mark.parametrize(
    "size",
    [(64, 64), (128, 128), (40, 40), (96, 128), (150, 100), (32, 48), (96, 160)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_clip_score_is_the_cosine_that_transformers_computes(emoji_clip, size):
    arrays = smooth_images(*size)
    got = emoji_clip(pixels_of(arrays), PROMPTS)
    torch.testing.assert_close(got, clip_by_transformers(arrays, PROMPTS), rtol=0, atol=2e-3)
    assert got.std() > 0.1


def test_clip_score_truncates_prompts_that_are_too_long(emoji_clip):
    images = pixels_of(smooth_images(64, 64, count=1))
    long = " ".join([PROMPTS[0]] * 5)
    expected = clip_by_transformers(smooth_images(64, 64, count=1), [long])
    torch.testing.assert_close(emoji_clip(images, [long]), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [64, 96])
def test_the_gradient_of_clip_score_reaches_the_pixels(emoji_clip, size):
    # Away from 0 and 1, where resizing clamps.
    images = 0.25 + 0.5 * pixels_of(smooth_images(size, size))
    assert_gradient_is_the_slope(emoji_clip, images, PROMPTS, step=3e-2, tolerance=3e-2)
    assert not any(parameter.requires_grad for parameter in emoji_clip.model.parameters())


def test_a_clip_that_is_not_there_is_named(tmp_path):
    with refused(str(tmp_path), "CLIP"):
        clip_score(tmp_path)


# Rewards by name.


def test_every_reward_is_found_by_its_name():
    images = pixels_of(smooth_images(64, 64))
    expected = {
        "clip_score": clip_score()(images, PROMPTS),
        "colourfulness": colourfulness(images, PROMPTS),
        "compressibility": compressibility(images, PROMPTS),
        "emoji_background": emoji_background(images, PROMPTS),
        "incompressibility": incompressibility(images, PROMPTS),
    } | {reward.__name__: reward(images, PROMPTS) for reward in (lightness, warmth, contrast, symmetry, subject_size)}
    # A weighted one is nothing without its terms, those of tests/test_rewards_native.py need their weights, and
    # tests/test_reward_ocr.py an extra.
    native = {"image_reward", "pickscore", "hpsv2", "hpsv2.1", "laion_aesthetic"}
    assert expected.keys() == REWARDS.keys() - native - {"weighted", "ocr", "image_reward_original", "hpsv3", "vila"}
    for name, values in expected.items():
        assert torch.equal(load_reward(name)(images, PROMPTS), values)
    assert torch.equal(load_reward(f"clip_score:{emoji.CLIP}")(images, PROMPTS), expected["clip_score"])


def test_a_reward_of_ones_own_is_a_function_in_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n"
        "def length_of_prompt(images, prompts):\n"
        "    return torch.tensor([float(len(prompt)) for prompt in prompts])\n\n"
        "number = 3\n"
    )
    reward = load_reward(f"{tmp_path}/mine.py:length_of_prompt")
    assert reward(torch.zeros(2, 3, 4, 4), ["one", "three"]).tolist() == [3, 5]
    for function in ("missing", "number", ""):
        with refused(f"{tmp_path}/mine.py", repr(function)):
            load_reward(f"{tmp_path}/mine.py:{function}")
    for code in ("def mine(", "import no_such_module"):
        (tmp_path / "broken.py").write_text(code)
        with refused(f"{tmp_path}/broken.py"):
            load_reward(f"{tmp_path}/broken.py:mine")
    with refused(f"{tmp_path}/other.py"):
        load_reward(f"{tmp_path}/other.py:length_of_prompt")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def mine(images): ...", "takes (images); expected (images, prompts)"),
        ("def mine(images, prompts, scale): ...", "takes (images, prompts, scale)"),
        ("class mine:\n    def __call__(self, images, prompts): ...", "a class"),
    ],
)
def test_a_function_of_other_parameters_is_refused_when_it_is_loaded(tmp_path, code, told):
    (tmp_path / "file.py").write_text(code)
    with refused(f"{tmp_path}/file.py:mine", told):
        load_reward(f"{tmp_path}/file.py:mine")


@pytest.mark.parametrize(
    "code",
    [
        "def mine(images, prompts, scale=2, **options): ...",
        "from functools import partial\nmine = partial(lambda images, texts, scale: ..., scale=3)",
        "class Kind:\n    def __call__(self, *given): ...\nmine = Kind()",
        "mine = max  # of C: it has no signature",
    ],
)
def test_functions_that_take_images_and_prompts_are_loaded(tmp_path, code):
    (tmp_path / "file.py").write_text(code)
    assert callable(load_reward(f"{tmp_path}/file.py:mine"))


@pytest.mark.parametrize("name", ["aesthetics", "", "aesthetics:model"])
def test_an_unknown_reward_is_named_with_those_there_are(name):
    with refused(repr(name.partition(":")[0]), ", ".join(REWARDS)):
        load_reward(name)


def test_an_argument_for_a_reward_that_takes_none_is_named():
    with refused("'90'"):
        load_reward("compressibility:90")


# What a reward returns.


def test_scores_are_float32_on_the_device_of_the_images():
    images = torch.zeros(3, 3, 4, 4)
    got = score(lambda images, prompts: torch.tensor([1, 2, 3]), images, PROMPTS)
    assert got.dtype == torch.float32
    assert got.device == images.device
    assert got.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_names_the_reward_and_the_prompt(value):
    with refused("'mine'", str(value), repr(PROMPTS[1])):
        score(lambda images, prompts: torch.tensor([1.0, value, value]), torch.zeros(3, 3, 4, 4), PROMPTS, name="mine")


@pytest.mark.parametrize(
    ("result", "culprit"),
    [
        (torch.zeros(2), "(2,)"),
        (torch.zeros(3, 1), "(3, 1)"),
        (torch.tensor(1.0), "()"),
        ([1.0, 2.0, 3.0], "list"),
        (np.zeros(3), "ndarray"),
        (None, "NoneType"),
    ],
    ids=["too few", "a column", "one number", "list", "array", "none"],
)
def test_a_result_that_is_not_one_number_an_image_is_named(result, culprit):
    with refused("'mine'", culprit, "3 images"):
        score(lambda images, prompts: result, torch.zeros(3, 3, 4, 4), PROMPTS, name="mine")
