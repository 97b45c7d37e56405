"""The published weights themselves: `pytest -m network` downloads about 14 GB of them, once."""

import hashlib
import urllib.request

import pytest
import torch

from stepfuse.rewards.image_files import read_pixels
from stepfuse.rewards.registry import load_reward

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(7200)]

# README.md of ImageReward, "Run Example", with its four pictures.
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
COMMIT = "c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb"
PICTURES = {
    "1.webp": "a5fcd126763da8b3fe2a9e620fc1ba03d215d20de36c77bf6770a540a9bc972d",
    "2.webp": "dc13919a49a37987d19c8be3ba0c1ef2941570f820f90fb66ac91a9a9db24082",
    "3.webp": "ee859bac167e6a04cbcde63454757b6fc7d9b8704429c15725ca8c4accf176e3",
    "4.webp": "84faf59d59d9ca7ab298c9acb957d727365ae104768ac1a1ec55ab96be68aaf9",
}
SCORES = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    loaded = []
    for name, digest in PICTURES.items():
        address = f"https://raw.githubusercontent.com/THUDM/ImageReward/{COMMIT}/assets/images/{name}"
        data = urllib.request.urlopen(address, timeout=60).read()
        assert hashlib.sha256(data).hexdigest() == digest
        (folder / name).write_bytes(data)
        loaded.append(read_pixels(folder / name))
    return loaded


def score(reward, pictures, prompt=PROMPT):
    return torch.cat([reward(picture, [prompt]) for picture in pictures]).tolist()


def test_image_reward_gives_the_scores_of_its_readme(pictures):
    assert score(load_reward("image_reward"), pictures) == pytest.approx(
        SCORES, abs=1e-2
    )  # "may be slightly different"


@pytest.mark.originals
def test_image_reward_original_gives_them_too(pictures):
    reward = load_reward("image_reward_original")
    try:
        assert score(reward, pictures) == pytest.approx(SCORES, abs=1e-2)
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    # Of images of models, as the papers' tables have them.
    [("pickscore", 15, 26), ("hpsv2", 0.15, 0.4), ("hpsv2.1", 0.1, 0.45)],
)
def test_published_weights_prefer_what_a_picture_shows(name, low, high, pictures):
    reward = load_reward(name)
    right, wrong = score(reward, pictures), score(reward, pictures, "a portrait of a dog in a kitchen")
    assert low < min(right)
    assert max(right) < high
    assert all(a > b for a, b in zip(right[:2], wrong[:2], strict=True))  # those that people ranked first


def test_published_aesthetic_scores_lie_where_people_voted(pictures):
    assert all(3 < value < 9 for value in score(load_reward("laion_aesthetic"), pictures))
