"""Images of every mode, and pixels as published models want them, against PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse.rewards.image_files import PromptedImage, in_batches, read_pixels
from stepfuse.rewards.pixels import resize_and_crop, resize_and_crop_smoothly, resize_and_pad
from stepfuse.rewards.registry import load_reward
from tests.fixtures_rewards import photographs, save_image_reward
from tests.fixtures_tiny import refused

ARRAY = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
GRAY = ARRAY[..., 0]


def pixels(array):
    """(height, width, 3) of bytes → (1, 3, height, width)."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float() / 255


def same(channel):
    return np.stack([channel] * 3, -1)


# Images.


def palette_picture():
    picture = Image.fromarray(ARRAY).quantize(8)
    return picture, np.asarray(picture.getpalette()[: 8 * 3]).reshape(8, 3)[np.asarray(picture)].astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "picture", "expected"),
    [
        ("RGB", Image.fromarray(ARRAY), ARRAY),
        ("L", Image.fromarray(GRAY), same(GRAY)),
        ("LA", Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(GRAY[::-1].copy())]), same(GRAY)),
        ("RGBA", Image.merge("RGBA", [Image.fromarray(c) for c in (*ARRAY.transpose(2, 0, 1), GRAY)]), ARRAY),
        ("P", *palette_picture()),
        ("1", Image.fromarray(GRAY > 127), same(((GRAY > 127) * 255).astype(np.uint8))),
        ("I;16", Image.fromarray(GRAY.astype(np.uint16) * 257), same(GRAY)),
        ("one pixel", Image.fromarray(ARRAY[:1, :1]), ARRAY[:1, :1]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_picture_of_any_mode_is_its_colours(mode, picture, expected, tmp_path):
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert mode == "one pixel" or saved.mode == mode
    assert torch.equal(read_pixels(tmp_path / "a.png"), pixels(expected))


@pytest.mark.parametrize("mode", ["P", "LA", "I;16", "one pixel"])
def test_image_reward_scores_pictures_of_any_mode(mode, tmp_path):
    save_image_reward(tmp_path / "weights")
    reward = load_reward(f"image_reward:{tmp_path / 'weights'}")
    photo = photographs(8)[0][0][:1]
    array = (photo[0] * 255).round().byte().permute(1, 2, 0).numpy()
    if mode == "one pixel":
        array = array[:1, :1]
        picture = Image.fromarray(array)
    else:
        gray = array[..., 1]
        picture = {
            "P": Image.fromarray(array).quantize(256),
            "LA": Image.merge("LA", [Image.fromarray(gray)] * 2),
            "I;16": Image.fromarray(gray.astype(np.uint16) * 257),
        }[mode]
        array = np.asarray(picture.convert("RGB")) if mode == "P" else same(gray)
    picture.save(tmp_path / "a.png")
    found = reward(read_pixels(tmp_path / "a.png"), ["a cat"])
    assert torch.equal(found, reward(pixels(array), ["a cat"]))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("kind", ["text", "cut off", "floats", "empty"])
def test_a_picture_that_cannot_be_read_is_named(kind, tmp_path):
    file = tmp_path / "a.png"
    if kind == "text":
        file.write_text("I am a picture")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "floats":
        file = tmp_path / "a.tiff"
        Image.fromarray(GRAY.astype(np.float32)).save(file)
    else:
        Image.fromarray(np.tile(ARRAY, (40, 40, 1))).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with refused(str(file)):
        read_pixels(file)


# Pixels as models want them, against PIL.


@pytest.mark.parametrize("size", [(64, 64), (40, 91), (91, 40), (33, 32), (32, 35), (1, 1), (3, 50)])
@pytest.mark.parametrize("round_margins", [False, True])
def test_resizing_is_pils_to_the_last_bit(size, round_margins):
    array = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    height, width = size
    target = (32, int(32 * width / height)) if height <= width else (int(32 * height / width), 32)
    resized = Image.fromarray(array).resize(target[::-1], Image.Resampling.BICUBIC)
    spare = ((target[0] - 32) / 2, (target[1] - 32) / 2)
    top, left = (round(s) if round_margins else int(s) for s in spare)
    expected = np.asarray(resized)[top : top + 32, left : left + 32]
    found = resize_and_crop(pixels(array), 32, round_margins=round_margins)
    assert torch.equal(found, pixels(expected))
    assert resize_and_crop(pixels(array).requires_grad_(True), 32, round_margins=round_margins).requires_grad


@pytest.mark.parametrize("size", [(64, 64), (40, 91), (3, 50)])
def test_resizing_real_numbers_differs_by_rounding_to_bytes_along_and_across(size):
    # Smooth and away from black and white: what the filter overshoots PIL cuts off after each way.
    coarse = 0.25 + 0.5 * torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").mul(255).round() / 255
    apart = resize_and_crop(smooth, 32) - resize_and_crop_smoothly(smooth, 32)
    # Half a byte along, which the filter's weights across take at most 1.25 times, and half a byte more.
    assert 0 < apart.abs().max() <= 1.125 / 255


def test_bars_are_black_and_share_what_is_left():
    found = resize_and_pad(torch.ones(1, 3, 20, 45), 30)  # 45 → 30, 20 → 13: bars of 8 and 9
    rows = found[0, 0, :, 15]
    assert found.shape == (1, 3, 30, 30)
    assert (rows[:8] == 0).all()
    assert torch.allclose(rows[8:21], torch.ones(13))
    assert (rows[21:] == 0).all()


def test_a_strip_is_refused_rather_than_resized_whole():
    with refused("1 × 10000"):
        resize_and_crop(torch.zeros(1, 3, 10000, 1), 224)


def test_batches_of_large_images_are_smaller(tmp_path):
    for i in range(3):
        Image.new("RGB", (5000, 4000)).save(tmp_path / f"{i}.png")
    items = [PromptedImage(file=tmp_path / f"{i}.png", name=str(i), prompt="") for i in range(3)]
    assert [len(batch) for batch, _ in in_batches(items, 16)] == [1, 1, 1]  # two are 40 megapixels
