"""The emoji world's prompts and pictures, and prompts from elsewhere."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from stepfuse.data import emoji
from stepfuse.data.images import to_image, to_pixels
from stepfuse.data.prompts import load_prompts
from stepfuse.scripts.emoji.images import render
from tests.fixtures_tiny import refused

# Prompts.


def test_every_concept_holds_out_two_of_the_twelve_backgrounds():
    assert len(emoji.BACKGROUNDS) == 12
    held_out, trained = Counter(), Counter()
    for prompt in emoji.prompts():
        (held_out if prompt.held_out else trained)[prompt.concept] += 1
    assert held_out == dict.fromkeys(emoji.concepts(), 2)
    assert trained == dict.fromkeys(emoji.concepts(), 10)


def test_every_background_is_held_out_by_a_sixth_of_the_concepts():
    held_out = Counter(prompt.background for prompt in emoji.prompts() if prompt.held_out)
    assert held_out.keys() == emoji.BACKGROUNDS.keys()
    assert all(abs(count - len(emoji.concepts()) / 6) < 1 for count in held_out.values())


def test_the_splits_are_disjoint_and_hold_every_prompt():
    trained, held_out = emoji.captions(held_out=False), emoji.captions(held_out=True)
    assert set(trained).isdisjoint(held_out)
    assert len(trained) + len(held_out) == 12 * len(emoji.concepts())
    assert set(trained) | set(held_out) == {prompt.caption for prompt in emoji.prompts()}
    pairs = {(prompt.concept, prompt.background) for prompt in emoji.prompts()}
    assert pairs == {(concept, colour) for concept in emoji.concepts() for colour in emoji.BACKGROUNDS}


def test_captions_are_unique():
    captions = emoji.captions(held_out=False) + emoji.captions(held_out=True)
    assert len(captions) == len(set(captions))
    assert len(emoji.concepts()) == len(set(emoji.concepts().values()))


@pytest.mark.parametrize(
    ("concept", "background", "caption"),
    [
        ("red apple", "blue", "a red apple on a blue background"),
        ("owl", "orange", "an owl on an orange background"),
    ],
)
def test_captions_have_their_articles(concept, background, caption):
    assert emoji.EmojiPrompt(concept=concept, background=background, held_out=False).caption == caption


# Pictures.


def test_every_picture_goes_through_pixels_unchanged():
    values = torch.arange(256).repeat(3).reshape(3, 16, 16)
    values = torch.stack([values[0], values[1].flip(0), values[2].T])
    image = to_image(values / 255)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert [image.getpixel((2, 1))[c] for c in range(3)] == values[:, 1, 2].tolist()
    assert torch.equal(to_pixels(image), values.float() / 255)


def test_pixels_are_rounded_and_clamped():
    levels = torch.tensor([-0.5, 0.49 / 255, 0.51 / 255, 254.4 / 255, 1.5])
    image = to_image(levels.reshape(1, 1, 5).expand(3, 1, 5))
    assert [image.getpixel((i, 0)) for i in range(5)] == [(v, v, v) for v in (0, 0, 1, 254, 255)]


def test_a_picture_that_is_wide_or_has_no_colours_makes_pixels():
    image = Image.new("L", (3, 2))
    image.putdata([0, 51, 102, 153, 204, 255])
    expected = torch.tensor([[0, 0.2, 0.4], [0.6, 0.8, 1]]).expand(3, 2, 3)
    torch.testing.assert_close(to_pixels(image), expected)


def test_a_picture_has_the_colour_of_its_background_and_the_emoji_within():
    """A green square of 48 of 72 pixels, drawn at 0.66 to 0.94 of 64, 42 to 60: its sides are 28 to 40 pixels."""
    square = Image.new("RGBA", (72, 72), (0, 255, 0, 0))
    square.paste((0, 255, 0, 255), (12, 12, 60, 60))
    purple = torch.tensor(emoji.BACKGROUNDS["purple"])[:, None]
    sides = []
    for seed in range(30):
        image = render(square, "purple", torch.Generator().manual_seed(seed))
        assert image.size == (64, 64)
        pixels = to_pixels(image) * 255
        within = pixels[2] < purple[2] / 2  # blue: 176 around, 0 within
        sides.append(int(within.sum()) ** 0.5)
        corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        # The shade is off by 14, a gradient by 30 along an axis of length 1, √2 in the corners.
        assert (corners - purple).abs().max() <= 14 + 30 * 2**0.5 + 1
    assert 27 <= min(sides) < 32
    assert 36 < max(sides) <= 41


def test_a_picture_is_that_of_its_seed():
    disc = Image.new("RGBA", (72, 72), (0, 255, 0, 255))
    first, again, other = (render(disc, "red", torch.Generator().manual_seed(seed)).tobytes() for seed in (0, 0, 1))
    assert first == again != other


# Prompts from elsewhere.


def test_prompts_come_from_a_file_a_line_each(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog  \n\t\na café, at night\n", encoding="utf-8")
    assert load_prompts(str(file)) == ["a cat", "a dog", "a café, at night"]


def test_prompts_come_from_the_emoji_world():
    assert load_prompts("emoji") == emoji.captions(held_out=False)
    assert load_prompts("emoji-heldout") == emoji.captions(held_out=True)


def test_a_file_without_prompts_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    for text in ("", "\n \n\t\n"):
        file.write_text(text)
        with refused(str(file), "empty"):
            load_prompts(str(file))
    for wrong, remedy in ((tmp_path / "missing.txt", "emoji-heldout"), (tmp_path, "text file")):
        with refused(str(wrong), remedy):
            load_prompts(str(wrong))


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A folder of JSON lines, as `load_dataset` takes it; what it builds stays in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"text": "a cat", "note": ""}, {"text": "", "note": ""}, {"text": "a dog", "note": ""}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"text": "a fox", "note": ""}) + "\n")
    return str(folder)


def test_prompts_come_from_a_column_of_a_data_set(data_set):
    assert load_prompts("emoji", dataset_name=data_set, column="text") == ["a cat", "a dog"]
    assert load_prompts("emoji", dataset_name=data_set, split="test", column="text") == ["a fox"]


def test_columns_and_splits_that_a_data_set_lacks_are_named(data_set):
    with refused(data_set, "'caption'", "text, note"):
        load_prompts("emoji", dataset_name=data_set)
    with refused(data_set, "'note'"):
        load_prompts("emoji", dataset_name=data_set, column="note")
    with refused("validation", "train", "test"):
        load_prompts("emoji", dataset_name=data_set, split="validation", column="text")


def test_a_data_set_that_is_not_there_is_named(data_set):
    for missing in (f"{data_set}/missing", "stepfuse-tests/no-such-data"):
        with refused(missing):
            load_prompts("emoji", dataset_name=missing)
