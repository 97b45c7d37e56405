"""The cache of prompt embeddings: one negative prompt for all, and no more bytes than it may have."""

import pytest
import torch

from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.train import conditioning
from stepfuse.train.conditioning import Embeddings
from tests.fixtures_tiny import save_stable_diffusion_xl

CPU = torch.device("cpu")
PROMPTS = [f"a fox, number {number}" for number in range(5)]
# 16 tokens of two text encoders of width 32, the pooled text of width 24, and six numbers of the image size
ROW = 4 * (16 * 2 * 32 + 24 + 6)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return backbone_of(load_pipeline(str(save_stable_diffusion_xl(tmp_path_factory.mktemp("xl")))))


@pytest.fixture
def encoded(backbone, monkeypatch):
    """The prompts that the text encoders are asked for."""
    asked, encode = [], backbone.encode

    def counting(prompts, *arguments, **options):
        asked.extend(prompts)
        return encode(prompts, *arguments, **options)

    monkeypatch.setattr(backbone, "encode", counting)
    return asked


def test_all_prompts_have_one_negative_prompt(backbone, encoded):
    embed = Embeddings(backbone, CPU)
    found = embed([*PROMPTS, PROMPTS[1]])
    assert encoded == PROMPTS
    assert embed.cached_bytes == (5 + 1) * ROW
    for row, prompt in enumerate([*PROMPTS, PROMPTS[1]]):
        alone = backbone.encode([prompt])
        for got, expected in ((found.positive, alone.positive), (found.negative, alone.negative)):
            assert {name: torch.equal(got[name][row : row + 1], value) for name, value in expected.items()} == (
                dict.fromkeys(expected, True)
            )


def test_prompts_that_were_not_asked_for_the_longest_are_forgotten_first(backbone, encoded, monkeypatch):
    monkeypatch.setattr(conditioning, "CACHED", 3 * ROW)
    embed = Embeddings(backbone, CPU)
    embed(PROMPTS[:3])
    embed(PROMPTS[:1])
    embed(PROMPTS[3:4])  # in place of number 1
    assert embed.cached_bytes == (3 + 1) * ROW
    del encoded[:]
    embed([PROMPTS[0], PROMPTS[2], PROMPTS[3]])
    assert encoded == []
    embed([PROMPTS[1]])
    assert encoded == [PROMPTS[1]]


def test_a_negative_prompt_of_its_own_is_kept_with_its_prompt(backbone, monkeypatch):
    """As a model family might have it that fits the negative prompt to the prompt."""
    encode = backbone.encode

    def of_its_own(prompts, *arguments, **options):
        return encode(prompts, [text.upper() for text in prompts], **options)

    monkeypatch.setattr(backbone, "encode", of_its_own)
    embed = Embeddings(backbone, CPU)
    found, expected = embed(["a cat", "two keys"]), of_its_own(["a cat", "two keys"])
    torch.testing.assert_close(found.negative, expected.negative, rtol=0, atol=1e-5)
    assert embed.cached_bytes == 2 * 2 * ROW
