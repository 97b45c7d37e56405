"""Forwards of a fixed number of rows: an image's bits do not depend on its batch; and few numbers of rows."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from stepfuse.fuse.backbones.row_counts import row_counts
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.rules.gap_profile import GapProfile
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.sampling.sampler import FusedSampler
from tests.fixtures_tiny import generators, refused

STEPS = 3
MIXED, SOLE = {"compressibility": 0.5, "alignment": 0.5}, {"alignment": 1.0}
OTHERS = [{"colourfulness": 1.0}, {"compressibility": 0.2, "colourfulness": 0.8}, {"compressibility": 1.0}]
PROMPTS = ["a fox", "a red apple on a blue background", "a dog", "a cat with a crown"]
RULES = {
    "product": {},
    "soup": {},
    "product, gate": {"gate": 1.0},
    "switch": {},
}


@pytest.fixture(scope="module")
def plain():
    return FusedSampler.from_pretrained("emoji")


@pytest.fixture(scope="module")
def fixed(plain):
    """As for a compiled network."""
    adapters = BatchedAdapters(plain.denoiser.network, plain.denoiser.batched.names)
    adapters.fix(16, torch.device("cpu"))
    return replace(plain, denoiser=replace(plain.denoiser, batched=adapters))


@pytest.fixture(scope="module")
def invariant():
    return FusedSampler.from_pretrained("emoji", batch_invariant=True)


def with_rule(sampler, name):
    """The sampler under a rule; a gate of 1 nat opens at every second step, for mixtures of two."""
    guidance = sampler.denoiser.guidance
    profile = GapProfile(
        num_inference_steps=STEPS,
        guidance=guidance.source,
        guidance_scale=guidance.effective_scale,
        images=1,
        mixtures=({"compressibility": 0.5, "alignment": 0.5},),
        gaps=((9.0, 0.1, 9.0),),
    )
    rule = get_rule(name.split(",")[0], **RULES[name])
    return replace(sampler, profiles=(profile,)).with_rule(rule)


def draw(sampler, weights, seeds, **options):
    """An image of each prompt of a seed, all in one batch."""
    return sampler.sample(
        [PROMPTS[seed] for seed in seeds],
        weights,
        generator=generators(*seeds),
        num_inference_steps=STEPS,
        progress=False,
        **{"output_type": "pt"} | options,
    )


@pytest.mark.parametrize("own", [MIXED, SOLE], ids=["mixed", "sole"])
@pytest.mark.parametrize("rule", RULES)
def test_an_image_has_the_same_bits_alone_and_in_every_batch(invariant, rule, own):
    sampler = with_rule(invariant, rule)
    alone = draw(sampler, [own], [0])[0]
    assert torch.equal(draw(sampler, [own, *OTHERS[:2]], [0, 1, 2])[0], alone)
    assert torch.equal(draw(sampler, [OTHERS[2], OTHERS[0], own], [3, 1, 0])[2], alone)


@pytest.mark.parametrize("rule", RULES)
def test_with_a_fixed_number_of_rows_images_are_the_same_up_to_rounding(plain, invariant, rule):
    expected, got = (draw(with_rule(s, rule), [MIXED, OTHERS[1]], [0, 1]) for s in (plain, invariant))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_every_forward_has_exactly_the_rows_of_one_image(invariant):
    """Three adapters and the base; this set is sampled without guidance, so there is no negative prompt."""
    sampler = with_rule(invariant, "product")
    with rows_of_forwards(sampler) as sizes:
        draw(sampler, [MIXED, OTHERS[1], SOLE], [0, 1, 2])
    assert set(sizes) == {4}
    assert len(sizes) == STEPS * 2  # 2 + 2 + 1 rows a step


@contextmanager
def rows_of_forwards(sampler):
    sizes = []
    hook = sampler.denoiser.network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    yield sizes
    hook.remove()


@pytest.mark.parametrize(
    ("rule", "runs", "options", "before", "after"),
    [
        # four rows under the negative prompt and two adapters each, or a soup
        ("product, gate", [[MIXED] * 4], {}, {12, 8}, {12, 8}),
        ("product", [[MIXED] * 4], {"guidance_interval": (0.3, 1.0)}, {12, 8}, {12, 8}),
        # g images with two adapters, the others with one: 8 + g rows; at the gated step 8 - g, and g of a soup
        (
            "product, gate",
            [[MIXED] * g + [SOLE] * (4 - g) for g in range(5)],
            {},
            {8, 9, 10, 11, 12, 7, 1, 6, 2, 5, 3},
            {12, 8, 4},
        ),
    ],
    ids=["gate", "guidance interval", "weights by image"],
)
def test_fixed_routes_have_few_numbers_of_rows(plain, fixed, rule, runs, options, before, after):
    """Of compiled networks, which record a CUDA graph for each: multiples of the four images."""
    drawn = []
    for sampler, expected in ((plain, before), (fixed, after)):
        chosen = with_rule(guided(sampler), rule)
        with rows_of_forwards(chosen) as sizes:
            drawn.append([draw(chosen, run, range(4), output_type="latent", **options) for run in runs])
        assert set(sizes) == expected
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


def guided(sampler):
    guidance = replace(sampler.denoiser.guidance, source="shared", scale=3.0)
    return replace(sampler, denoiser=replace(sampler.denoiser, guidance=guidance))


def test_numbers_of_rows_are_multiples_within_the_most():
    assert row_counts(7) == [7]
    assert row_counts(7, multiple=4) == [8]
    assert row_counts(7, most=3) == [3, 3, 1]
    assert row_counts(7, most=5, multiple=4) == [5, 4]
    assert row_counts(9, most=5, multiple=5) == [5, 5]
    assert row_counts(8, most=4, multiple=8) == [4, 4]


def test_what_depends_on_the_batch_is_refused(invariant):
    with refused("code", "batch_invariant"):
        invariant.with_rule("code")
    with refused("rows_at_once"):
        replace(invariant.denoiser, rows_at_once=None)
