"""Weighted sums of rewards, and the held-out reward of the emoji world: arithmetic in sight, and what is refused."""

import pytest
import torch

from stepfuse.data.emoji import BACKGROUNDS
from stepfuse.rewards.clip_score import clip_score
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.rewards.compressibility import compressibility
from stepfuse.rewards.emoji_background import emoji_background
from stepfuse.rewards.registry import is_catalogued, load_reward, local_parts
from stepfuse.rewards.reward_name import Term, parse_reward, parse_terms
from stepfuse.rewards.weighted import Weighted, as_sum
from tests.fixtures_tiny import refused

PROMPTS = ["a red apple on a blue background", "a fox on a green background"]


def noise(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1*a", [("a", 1, 1)]),
        ("3*a/2 + 1*b", [("a", 0.75, 2), ("b", 0.25, 1)]),
        ("0.5*a/1e-2  +  0.5*b/6", [("a", 0.5, 0.01), ("b", 0.5, 6)]),
        ("1e-1*a + 0*b", [("a", 1, 1), ("b", 0, 1)]),
        # A hub id has a slash of its own; a scale is the number after the last one.
        (
            "1*clip_score:openai/clip-vit-base-patch32/6 + 1*clip_score:openai/clip",
            [("clip_score:openai/clip-vit-base-patch32", 0.5, 6), ("clip_score:openai/clip", 0.5, 1)],
        ),
        ("2*rewards/mine.py:brightness/10", [("rewards/mine.py:brightness", 1, 10)]),
    ],
)
def test_a_sum_is_read_and_its_weights_normalised(text: str, expected: list[tuple[str, float, float]]) -> None:
    found = [(term.name, term.weight, term.scale) for term in parse_terms(text)]
    assert [name for name, _, _ in found] == [name for name, _, _ in expected]
    for (_, *values), (_, *wanted) in zip(found, expected, strict=True):
        assert values == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("", ["''", "WEIGHT*REWARD/SCALE"]),
        ("colourfulness", ["'colourfulness'", "WEIGHT*REWARD/SCALE"]),
        ("x*a", ["'x*a'"]),
        ("1*a + ", ["''"]),
        ("1-2*a", ["'1-2*a'"]),
        ("-1*a + 2*b", ["'-1*a'", "weight of 0 or more"]),
        ("1*a/0", ["'1*a/0'", "positive scale"]),
        ("1*a/1e999", ["'1*a/1e999'", "positive scale"]),
        ("1e999*a", ["'1e999*a'"]),
        ("1*a/2 + 1*a/3", ["twice"]),
        ("0*a + 0*b", ["sum to 0"]),
    ],
)
def test_a_sum_that_is_none_is_refused(text: str, culprits: list[str]) -> None:
    with refused("weighted reward", *culprits):
        parse_terms(text)
    with refused("weighted reward", *culprits):
        load_reward(f"weighted:{text}")


def test_the_sum_is_that_of_its_scaled_rewards() -> None:
    images = noise()
    expected = 0.25 * compressibility(images, PROMPTS) / 0.5 + 0.75 * clip_score()(images, PROMPTS) / 6
    found = load_reward("weighted:1*compressibility/0.5 + 3*clip_score/6")(images, PROMPTS)
    torch.testing.assert_close(found, expected)


def test_the_gradient_is_that_of_its_rewards() -> None:
    images = noise().requires_grad_()
    (found,) = torch.autograd.grad(load_reward("weighted:2*colourfulness/4")(images, PROMPTS).sum(), images)
    (expected,) = torch.autograd.grad((colourfulness(images, PROMPTS) / 4).sum(), images)
    torch.testing.assert_close(found, expected)


def test_a_reward_of_no_weight_is_not_loaded() -> None:
    reward = load_reward("weighted:1*colourfulness + 0*clip_score:no/such/model")
    torch.testing.assert_close(reward(noise(), PROMPTS), colourfulness(noise(), PROMPTS))


def test_a_sum_of_an_unknown_reward_names_it() -> None:
    with refused("'beauty'"):
        load_reward("weighted:1*colourfulness + 1*beauty")


def test_a_reward_that_fails_within_a_sum_is_named() -> None:
    terms = [Term(name="whole", weight=0.5), Term(name="broken", weight=0.5)]
    rewards = {"whole": colourfulness, "broken": lambda images, prompts: torch.full((len(images),), float("nan"))}
    reward = Weighted(terms, rewards.__getitem__)
    with refused("broken"):
        reward(noise(), PROMPTS)


# The background that the prompt names.


def on(background: str, centre: tuple[int, int, int], size: int = 64) -> torch.Tensor:
    """A picture of one colour with a square of another that covers 7/8 of it each way."""
    picture = torch.tensor(BACKGROUNDS[background], dtype=torch.float32)[:, None, None].repeat(1, size, size)
    edge = size // 16
    picture[:, edge:-edge, edge:-edge] = torch.tensor(centre, dtype=torch.float32)[:, None, None]
    return picture / 255


@pytest.mark.parametrize("size", [32, 64, 512])
def test_the_named_background_scores_0_whatever_lies_on_it(size: int) -> None:
    pictures = torch.stack([on("blue", (255, 0, 0), size), on("green", (1, 2, 3), size)])
    torch.testing.assert_close(emoji_background(pictures, PROMPTS), torch.zeros(2), atol=1e-3, rtol=0)


def test_another_background_scores_its_distance() -> None:
    """Blue is (52, 96, 200) and white (242, 242, 240): sqrt((190² + 146² + 40²) / 3) = 140.3."""
    (value,) = emoji_background(on("white", (52, 96, 200))[None], PROMPTS[:1]).tolist()
    assert value == pytest.approx(-(((190**2 + 146**2 + 40**2) / 3) ** 0.5), rel=1e-5)


@pytest.mark.parametrize("prompt", ["a dog", "a dog on a teal background", "a dog on a background"])
def test_a_prompt_without_a_background_of_the_world_is_refused(prompt: str) -> None:
    with refused(repr(prompt), *BACKGROUNDS):
        emoji_background(noise()[:1], [prompt])


# Names.


@pytest.mark.parametrize(
    ("text", "kind", "head", "argument", "path", "objective"),
    [
        ("hpsv2.1", "catalogue", "hpsv2.1", "", "", "hpsv2_1"),
        (
            "clip_score:openai/clip-vit-base-patch32",
            "catalogue",
            "clip_score",
            "openai/clip-vit-base-patch32",
            "",
            None,
        ),
        ("clip_score:weights/of.py:mine", "catalogue", "clip_score", "weights/of.py:mine", "", None),
        ("http://127.0.0.1:8765", "server", "http", "", "", "http"),
        ("mine.py:brightness", "function", "mine.py", "brightness", "mine.py", "brightness"),
        ("../a b/mine.py:brightness", "function", "../a b/mine.py", "brightness", "../a b/mine.py", "brightness"),
        ("C:/rewards/mine.py:brightness", "function", "C", "brightness", "C:/rewards/mine.py", "brightness"),
        ("rewards/mine.yaml", "file", "rewards/mine.yaml", "", "rewards/mine.yaml", "mine"),
        ("weighted:1*mine.py:f + 1*b", "sum", "weighted", "1*mine.py:f + 1*b", "", "weighted"),
        ("mine.py", "catalogue", "mine.py", "", "", None),
    ],
)
def test_a_name_is_parsed_to_its_kind_and_parts(text, kind, head, argument, path, objective):
    name = parse_reward(text)
    assert (name.kind, name.head, name.argument, name.path) == (kind, head, argument, path)
    assert objective in (None, name.objective)


def test_any_reward_is_a_sum_of_terms():
    assert parse_reward("mine.py:f").terms == (Term(name="mine.py:f", weight=1),)
    assert [term.name for term in parse_reward("weighted:3*a/2 + 1*mine.py:f").terms] == ["a", "mine.py:f"]
    one = as_sum(colourfulness, "colourfulness")
    assert torch.equal(one.terms_of(noise(), PROMPTS)[:, 0], colourfulness(noise(), PROMPTS))
    assert list(one.rewards.values()) == [colourfulness]
    two = Weighted(parse_terms("1*a + 1*b"), {"a": colourfulness, "b": compressibility}.__getitem__)
    assert as_sum(two, "two") is two


@pytest.mark.parametrize(
    ("name", "catalogued", "local"),
    [
        ("colourfulness", True, []),
        ("image_reward:weights/", True, [("image_reward:weights/", "a local folder")]),
        ("mine.py:f", False, [("mine.py:f", "a local file")]),
        ("weighted:1*colourfulness + 1*mine.py:f", False, [("mine.py:f", "a local file")]),
        ("weighted:1*colourfulness + 1*http://host:1", False, [("http://host:1", "a server")]),
        ("unknown", False, []),
        ("weighted:malformed", True, []),  # it cannot be loaded
    ],
)
def test_what_of_a_reward_is_not_in_the_catalogue(name, catalogued, local):
    assert is_catalogued(name) == catalogued
    assert local_parts(name) == local
