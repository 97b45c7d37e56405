"""What only a GPU can show, on the bundled set; scripts/gpu_check runs these, also on the pretended device."""

import pytest
import torch

from stepfuse.fuse.sampling.sampler import FusedSampler
from tests.fixtures_tiny import generators

pytestmark = pytest.mark.gpu

STEPS = 3
PROMPTS = ["a fox", "a red apple on a blue background", "a dog"]
MIXED, OTHERS = {"compressibility": 0.5, "alignment": 0.5}, [{"colourfulness": 1.0}, {"compressibility": 1.0}]


def draw(sampler, weights, seeds, **options):
    """An image of each prompt of a seed, all in one batch."""
    given = {"generator": generators(*seeds), "num_inference_steps": STEPS, "output_type": "pt", "progress": False}
    return sampler.sample([PROMPTS[seed] for seed in seeds], weights, **given | options)


@pytest.fixture(scope="module")
def on_gpu():
    return FusedSampler.from_pretrained("emoji", device="cuda")


@pytest.fixture(scope="module")
def on_cpu():
    return FusedSampler.from_pretrained("emoji", device="cpu")


@pytest.fixture(scope="module")
def invariant():
    return FusedSampler.from_pretrained("emoji", device="cuda", batch_invariant=True)


@pytest.mark.parametrize("rule", ["product", "soup", "switch", "average_noise"])
def test_a_gpu_draws_what_the_cpu_draws(on_cpu, on_gpu, rule):
    expected, drawn = (draw(sampler.with_rule(rule), MIXED, (0, 1)) for sampler in (on_cpu, on_gpu))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("rule", ["product", "soup", "switch"])
def test_with_batch_invariant_an_image_has_the_same_bits_in_every_batch(invariant, rule):
    sampler = invariant.with_rule(rule)
    alone = draw(sampler, MIXED, (0,))
    assert torch.equal(draw(sampler, MIXED, (0, 1, 2))[:1], alone)
    assert torch.equal(draw(sampler, [OTHERS[0], MIXED, OTHERS[1]], (1, 0, 2))[1:2], alone)


@pytest.mark.parametrize("how", ["regional", "full"])
def test_recorded_graphs_draw_what_the_network_draws(on_gpu, how):
    """Twice as graphs are recorded, and once as they are replayed, with weights that change the number of rows."""
    weights = [MIXED, OTHERS[0]]
    expected = draw(on_gpu, weights, (0, 1))
    compiled = FusedSampler.from_pretrained("emoji", device="cuda")
    compiled.compile(how, rows=8, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(draw(compiled, weights, (0, 1)), expected, rtol=0, atol=0.02)
    draw(compiled, MIXED, (0, 1))
    torch.testing.assert_close(draw(compiled, weights, (0, 1)), expected, rtol=0, atol=0.02)


def test_half_precision_draws_finite_images():
    sampler = FusedSampler.from_pretrained("emoji", device="cuda", dtype=torch.bfloat16)
    assert bool(torch.isfinite(draw(sampler, MIXED, (0, 1), guidance_interval=(0.0, 0.5))).all())
