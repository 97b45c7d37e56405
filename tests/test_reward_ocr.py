"""The reward `ocr`: edit distances by hand, and text that PIL has drawn, read by rapidocr where it is installed."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.text_legibility import edit_distance, legibility, quoted_texts
from tests.fixtures_tiny import refused

# What prompts ask for.


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('A sign that says "OPEN".', ["OPEN"]),
        ('A mug with "Be Kind" and a card with "24/7"', ["Be Kind", "24/7"]),
        ("a poster “Bonne Année”, large", ["Bonne Année"]),
        ('“first” and "second"', ["first", "second"]),
        ('a door "" with "Push"', ["Push"]),
        ('a board of 12" with "日本"', [" with "]),  # as split('"') pairs them
    ],
)
def test_the_texts_of_a_prompt_are_those_between_double_quotes(prompt, texts):
    assert quoted_texts(prompt) == texts


@pytest.mark.parametrize("prompt", ["a red apple", "it's 'OPEN'", 'an unclosed "quote', 'a sign "" and “ ”', ""])
def test_a_prompt_without_quoted_text_is_named(prompt):
    with refused(repr(prompt), "double quotes"):
        quoted_texts(prompt)


# How well they were read.


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),  # k → s, e → i, + g
        ("flaw", "lawn", 2),  # − f, + n
        ("", "abc", 3),
        ("abc", "", 3),
        ("open", "open", 0),
        ("ab", "ba", 2),  # a transposition is two substitutions
        ("straße", "strasse", 2),
        ("日本語", "日本", 1),
    ],
)
def test_the_edit_distance_is_that_of_levenshtein(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("read", "text", "reward"),
    [
        ("OPEN", "open", 1),
        ("Hello\nWorld", "hello world", 1),
        ("welcome to the museum, open daily", "OPEN", 1),  # other text costs nothing if all was read
        ("OPN", "OPEN", 1 - 1 / 4),
        ("OPFM", "OPEN", 1 - 2 / 4),
        ("OPENN!", "OPEN!", 1 - 1 / 5),
        ("", "OPEN", 0),
        ("nothing of the kind", "OPEN", 0),  # 16 letters apart, and at most 4 count
        ("ＯＰＥＮ", "open", 1),  # full-width letters
        ("cafe\u0301", "café", 1),  # an accent of its own
        ("cafe", "café", 1 - 1 / 4),
    ],
)
def test_legibility_of_one_text_is_that_of_flow_grpo(read, text, reward):
    assert legibility(read, [text]) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("read", "reward"),
    [
        ("OPEN CLOSED", 1),
        ("CLOSED OPEN", 1),  # in any order
        ("OPEN CLOSD", (1 + 5 / 6) / 2),  # of `opencloSd` less `open`, one of six letters is missing
        ("CLOPENSD", (1 + 1 - 2 / 6) / 2),  # `cl` and `sd` are left
        ("OPEN", (1 + 0) / 2),
        ("", 0),
    ],
)
def test_several_texts_count_alike_and_each_place_once(read, reward):
    assert legibility(read, ["OPEN", "CLOSED"]) == pytest.approx(reward)


def test_a_text_that_is_asked_for_twice_must_be_there_twice():
    assert legibility("ha", ["ha", "ha"]) == 0.5
    assert legibility("ha ha", ["ha", "ha"]) == 1
    # The longest first: `art` is also in `start`.
    assert legibility("start art", ["art", "start"]) == legibility("art start", ["start", "art"]) == 1


# The reward.


def drawn(*texts, size=(192, 128)):
    """Black text in PIL's own font on white, one image a text, as pixels."""
    font = ImageFont.load_default(size[1] // 4)
    arrays = []
    for text in texts:
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).multiline_text((12, 16), text, fill="black", font=font)
        arrays.append(np.array(image))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr", reason="280 MB with onnxruntime and OpenCV; pip install 'stepfuse[ocr]'")
    return load_reward("ocr")


IMAGES = ("OPEN", "OPEN\nDAILY", "OPAN", "MUSEUM", "", "BAKERY")
PROMPTS = (*['A sign that says "Open"'] * 5, 'A sign "Open" on a "Bakery"')
EXPECTED = (1, 1, 1 - 1 / 4, 0, 0, (1 + 0) / 2)


def test_text_that_was_drawn_is_scored_by_its_distance_from_the_prompts(ocr):
    """All of it, with other text, one of four letters wrong, others, none, and one of two texts.

    "MUSEUM" shares only its E with "OPEN": it is 5 edits away, of which 4 count.
    """
    scores = ocr(drawn(*IMAGES), PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(EXPECTED)


def test_a_score_depends_on_its_image_alone_and_is_the_same_again(ocr):
    images, prompts = drawn(*IMAGES[1:3]), PROMPTS[1:3]
    scores = ocr(images, prompts)
    alone = torch.cat([ocr(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert torch.equal(alone, scores)
    assert torch.equal(ocr(images.flip(0), prompts[::-1]).flip(0), scores)


def test_a_prompt_without_quotes_is_named_before_anything_is_read(ocr):
    with refused("'a red apple'"):
        ocr(drawn("OPEN", "OPEN"), [PROMPTS[0], "a red apple"])


def test_without_rapidocr_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with refused("reward ocr", "pip install 'stepfuse[ocr]'"):
        load_reward("ocr")


def test_an_argument_is_named():
    with refused("no argument", "'english'"):
        load_reward("ocr:english")


def test_the_list_says_what_to_install(monkeypatch):
    monkeypatch.setattr("stepfuse.rewards.named_reward.find_spec", lambda name: None)
    assert REWARDS["ocr"].state() == "needs pip install 'stepfuse[ocr]'"
