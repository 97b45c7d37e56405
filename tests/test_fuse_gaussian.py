"""Gaussians against torch.distributions, and their weighted product against numerical integration."""

from itertools import pairwise

import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch.distributions import Independent, Normal, kl_divergence

from stepfuse.fuse.diffusion.gaussian import Gaussian, product
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.diffusion.transition import transition

EXPERT = st.tuples(st.floats(-1.5, 2.5), st.floats(-3, 3), st.floats(0.05, 4))  # exponent, mean, variance


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(mean, variance):
    """A Gaussian on the line, as a batch of one."""
    return Gaussian(
        mean=torch.tensor([[mean]], dtype=torch.float64), variance=torch.tensor([[variance]], dtype=torch.float64)
    )


def vectors(count, variances, batch=4, dims=5):
    """Experts with one variance a sample; row i of `variances` is expert i's, repeated over the batch."""
    return [
        Gaussian(mean=random(batch, dims, seed=i), variance=torch.full((batch, 1), v, dtype=torch.float64))
        for i, v in zip(range(count), variances, strict=True)
    ]


def assert_same(first, second, tolerance=1e-12):
    torch.testing.assert_close(first.mean, second.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        first.variance.expand_as(first.mean), second.variance.expand_as(second.mean), rtol=tolerance, atol=tolerance
    )


# The product


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(EXPERT, min_size=1, max_size=5))
def test_the_product_is_the_integrated_product_of_densities(experts):
    a, m, v = (np.array(column) for column in zip(*experts, strict=True))
    # Where the precision nearly cancels, 1e-10 is out of reach in float64; here |m*| ≤ 3 / 0.3, v* ≤ 27.
    assume(np.abs(a).sum() > 0.5)
    assume((a / v).sum() > 0.3 * np.abs(a / v).sum())
    x = np.linspace(-80, 80, 40_001)  # the trapezoid rule is exact to rounding on a Gaussian: v* > 0.004 = step
    log_density = sum(a[i] * norm.logpdf(x, m[i], v[i] ** 0.5) for i in range(len(a)))
    density = np.exp(log_density - log_density.max())
    density /= np.trapezoid(density, x)
    mean = np.trapezoid(density * x, x)
    variance = np.trapezoid(density * (x - mean) ** 2, x)

    fused = product([scalar(m[i], v[i]) for i in range(len(a))], torch.tensor(a))

    assert fused.mean.item() == pytest.approx(mean, rel=1e-10, abs=1e-10)
    assert fused.variance.item() == pytest.approx(variance, rel=1e-10)


def test_one_extrapolated_expert_moves_away_from_the_reference():
    # 1/v* = 2/1 - 1/2 = 3/2 and m* = (2·3/1 - 1·1/2) / (3/2) = 11/3.
    fused = product([scalar(3.0, 1.0), scalar(1.0, 2.0)], torch.tensor([2.0, -1.0]))
    assert fused.mean.item() == pytest.approx(11 / 3, rel=1e-14)
    assert fused.variance.item() == pytest.approx(2 / 3, rel=1e-14)


@pytest.mark.parametrize("exponents", [(0.2, 0.5, 0.3), (0.9, 0.9, -0.8), (1.5, 0.0, -0.5)])
def test_equal_variances_average_the_means(exponents):
    experts = vectors(3, [0.37] * 3)
    fused = product(experts, torch.tensor(exponents, dtype=torch.float64))
    average = sum(a * expert.mean for a, expert in zip(exponents, experts, strict=True))
    torch.testing.assert_close(fused.mean, average, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.variance, experts[0].variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("exponents", [(0.2, 0.5, 0.3), (0.9, 0.9, -0.8)])
def test_equal_variances_average_the_predicted_noises(exponents, prediction_type):
    """DB-MPA (arXiv:2505.18547) averages noises; with equal variances the product is the same Gaussian."""
    path = NoisePath.from_scheduler(DDIMScheduler(clip_sample=False, prediction_type=prediction_type))
    x_t, predictions = random(4, 5, seed=9), [random(4, 5, seed=i) for i in range(3)]
    v = 0.6 * path.ancestral_variance(500, 400, x_t)
    experts = [transition(path, x_t, prediction, 500, 400, v) for prediction in predictions]
    averaged = sum(a * prediction for a, prediction in zip(exponents, predictions, strict=True))
    assert_same(
        product(experts, torch.tensor(exponents, dtype=torch.float64)),
        transition(path, x_t, averaged, 500, 400, v),
    )


def test_distinct_variances_do_not_average_the_predicted_noises():
    """What sets the product apart from DB-MPA; without it the tests above would show one method, not two."""
    path = NoisePath.from_scheduler(DDIMScheduler(clip_sample=False))
    x_t, noises = random(4, 5, seed=9), [random(4, 5, seed=i) for i in range(2)]
    ancestral = path.ancestral_variance(500, 400, x_t)
    experts = [transition(path, x_t, e, 500, 400, r * ancestral) for e, r in zip(noises, (0.1, 1.0), strict=True)]
    fused = product(experts, torch.tensor([0.5, 0.5], dtype=torch.float64))
    averaged = transition(path, x_t, sum(noises) / 2, 500, 400, fused.variance)
    assert (fused.mean - averaged.mean).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("exponents", "variances"),
    [((2.0, -1.0), (1.0, 0.25)), ((1.0, -1.0), (0.5, 0.5)), ((-1.0, 0.0), (1.0, 1.0))],
)
def test_a_precision_that_is_not_positive_is_an_error(exponents, variances):
    with pytest.raises(ValueError, match=r"precision 1/v\* is .* must be positive.*extrapolate too far"):
        product(vectors(2, variances), torch.tensor(exponents, dtype=torch.float64))


def test_one_sample_without_a_positive_precision_fails_the_batch():
    exponents = torch.tensor([[0.5, 2.0, 0.5, 0.5], [0.5, -1.0, 0.5, 0.5]], dtype=torch.float64)
    with pytest.raises(ValueError, match="must be positive"):
        product(vectors(2, (1.0, 0.25)), exponents)


def test_zero_variances_beside_others_are_refused():
    with pytest.raises(ValueError, match="deterministic and random"):
        product(vectors(2, (0.0, 0.5)), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_deterministic_and_random_schedules_are_refused_in_the_limit():
    with pytest.raises(ValueError, match="mix deterministic and random"):
        product(
            vectors(2, (0.0, 0.0)),
            torch.tensor([0.5, 0.5], dtype=torch.float64),
            relative_variances=torch.tensor([0.0, 1.0]),
        )


def test_zero_variances_give_the_limit_of_vanishing_ones():
    """v_i = r_i v (1 + c_i v): the mean differs from the limit's by O(v), so ten times less v, ten times less error."""
    r, c = torch.tensor([0.25, 0.64, 1.0], dtype=torch.float64), (3.0, -1.0, 2.0)
    exponents = torch.tensor([0.6, -0.2, 0.9], dtype=torch.float64)
    limit = product(vectors(3, [0.0] * 3), exponents, relative_variances=r)
    errors = []
    for v in (1e-3, 1e-4, 1e-5, 1e-6):
        near = product(vectors(3, [r[i].item() * v * (1 + c[i] * v) for i in range(3)]), exponents)
        errors.append((near.mean - limit.mean).abs().max().item())
        assert near.variance.max() < 2 * v
    assert errors[0] < 1e-2
    for coarse, fine in pairwise(errors):
        assert fine / coarse == pytest.approx(0.1, rel=0.02)
    assert (limit.variance == 0).all()


@pytest.mark.parametrize("relative_variances", [None, (0.0, 0.0, 0.0), (0.7, 0.7, 0.7)])
def test_zero_variances_of_one_schedule_average_the_means(relative_variances):
    experts = vectors(3, [0.0] * 3)
    exponents = torch.tensor([0.6, -0.2, 0.6], dtype=torch.float64)
    r = None if relative_variances is None else torch.tensor(relative_variances, dtype=torch.float64)
    fused = product(experts, exponents, relative_variances=r)
    average = 0.6 * experts[0].mean - 0.2 * experts[1].mean + 0.6 * experts[2].mean
    torch.testing.assert_close(fused.mean, average, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variances", [(0.3, 0.5, 0.9), (0.0, 0.0, 0.0)])
def test_exponents_per_sample_equal_separate_calls(variances):
    experts = vectors(3, variances)
    exponents = torch.tensor([[1.0, 0.2, 1.4, 0.0], [0.0, 0.5, -0.2, 0.5], [0.0, 0.3, -0.2, 0.5]], dtype=torch.float64)
    r = torch.tensor([0.25, 0.64, 1.0], dtype=torch.float64)
    together = product(experts, exponents, relative_variances=r)
    for row in range(4):
        alone = product(
            [Gaussian(mean=e.mean[[row]], variance=e.variance[[row]]) for e in experts],
            exponents[:, row],
            relative_variances=r,
        )
        assert torch.equal(together.mean[[row]], alone.mean)
        assert torch.equal(together.variance[[row]], alone.variance)


def test_exponent_one_gives_the_expert_back():
    experts = vectors(2, (0.3, 0.7))
    assert_same(product(experts, torch.tensor([0.0, 1.0], dtype=torch.float64)), experts[1])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 1)])
@pytest.mark.usefixtures("unchecked")
def test_exponents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"exponents of shape .* for 2 experts and a batch of 4"):
        product(vectors(2, (0.3, 0.7)), torch.ones(shape, dtype=torch.float64))


def test_a_product_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no experts"):
        product([], torch.zeros(0))


# One Gaussian

SHAPES = [(4, 1, 1, 1), (4, 2, 3, 3), (1, 1, 1, 1)]  # one variance a sample, one a dimension, one for all


def gaussian(variance_shape, seed=0):
    return Gaussian(mean=random(4, 2, 3, 3, seed=seed), variance=random(*variance_shape, seed=seed + 1).exp())


def reference(g):
    """The same Gaussian in torch.distributions."""
    return Independent(Normal(g.mean, g.variance.sqrt().expand_as(g.mean)), g.mean.ndim - 1)


@pytest.mark.parametrize("variance_shape", SHAPES)
def test_log_prob_is_the_sum_over_dimensions(variance_shape):
    g, x = gaussian(variance_shape), random(4, 2, 3, 3, seed=7)
    torch.testing.assert_close(g.log_prob(x), reference(g).log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("second", SHAPES)
def test_kl_of_different_means_and_variances(first, second):
    p, q = gaussian(first), gaussian(second, seed=20)
    torch.testing.assert_close(p.kl(q), kl_divergence(reference(p), reference(q)), rtol=1e-12, atol=1e-12)


def test_kl_to_itself_is_zero():
    g = gaussian(SHAPES[0])
    torch.testing.assert_close(g.kl(g), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_deterministic_step_has_no_density():
    point, g = Gaussian(mean=random(4, 5), variance=torch.zeros(4, 1)), vectors(1, [0.5])[0]
    for call in (lambda: point.log_prob(point.mean), lambda: point.kl(g), lambda: g.kl(point)):
        with pytest.raises(ValueError, match=r"variance 0: a deterministic step .* has no density"):
            call()


def test_one_deterministic_row_is_enough_for_the_error():
    variance = torch.tensor([[0.5], [0.0], [0.5], [0.5]])
    with pytest.raises(ValueError, match="has no density"):
        Gaussian(mean=random(4, 5), variance=variance).log_prob(random(4, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """float16 resolves 1e-3 only; on the same rounded numbers the results agree with float64 to float32's 1e-6."""
    means, x = [random(4, 5, seed=i).to(dtype) for i in range(2)], random(4, 5, seed=7).to(dtype)
    variances = [torch.full((4, 1), v, dtype=torch.float64).to(dtype) for v in (0.3, 0.7)]
    half = [Gaussian(mean=m, variance=v) for m, v in zip(means, variances, strict=True)]
    wide = [Gaussian(mean=m.double(), variance=v.double()) for m, v in zip(means, variances, strict=True)]
    exponents = torch.tensor([1.3, -0.3], dtype=torch.float64)
    pairs = [
        (half[0].log_prob(x), reference(wide[0]).log_prob(x.double())),
        (half[0].kl(half[1]), kl_divergence(reference(wide[0]), reference(wide[1]))),
        (product(half, exponents).mean, product(wide, exponents).mean),
        (product(half, exponents).variance, product(wide, exponents).variance),
    ]
    for got, expected in pairs:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    assert half[0].sample().dtype == torch.float32


def test_a_row_with_its_own_generator_does_not_depend_on_the_batch():
    g = gaussian(SHAPES[0])
    together = g.sample([torch.Generator().manual_seed(seed) for seed in (3, 1, 4, 15)])
    alone = Gaussian(mean=g.mean[[2]], variance=g.variance[[2]]).sample([torch.Generator().manual_seed(4)])
    assert torch.equal(together[[2]], alone)


def test_a_draw_is_the_mean_plus_scaled_noise():
    g = gaussian(SHAPES[0])
    noise = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = g.sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close((drawn - g.mean) / g.variance**0.5, noise, rtol=1e-12, atol=1e-12)


def test_a_draw_of_a_deterministic_step_is_its_mean():
    mean = random(4, 5)
    assert torch.equal(Gaussian(mean=mean, variance=torch.zeros(4, 1)).sample(), mean)


@pytest.mark.usefixtures("unchecked")
def test_a_variance_without_the_trailing_dimensions_is_refused():
    """(batch,) beside (batch, 4) would broadcast along the wrong axis without a word."""
    with pytest.raises(ValueError, match="variance has 1 dimensions and mean 2"):
        Gaussian(mean=random(4, 4), variance=torch.ones(4))


def test_named_shapes_are_checked_in_these_tests():
    standard = Gaussian(mean=torch.zeros(2, 3), variance=torch.ones(2, 1))
    with pytest.raises(jaxtyping.TypeCheckError, match="log_prob"):
        standard.log_prob(torch.zeros(()))  # no batch


def test_in_order_the_bits_of_a_product_of_nine_do_not_depend_on_the_batch():
    """With experts of exponent 0 among them, as a batch has those that other images use."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(9, 8, 5, generator=generator)
    v = 0.1 + torch.rand(9, 1, 1, generator=generator)
    a = torch.rand(9, 8, generator=generator) * (torch.rand(9, 8, generator=generator) > 0.3)
    a[0] = 1.0

    def fused(images, used):
        experts = [Gaussian(mean=means[i, images], variance=v[[i]].expand(len(images), 1, 1)[:, 0]) for i in used]
        return product(experts, a[used][:, images], in_order=True)

    together = fused(list(range(8)), list(range(9)))
    for image in range(8):
        alone = fused([image], a[:, image].nonzero().flatten().tolist())
        assert torch.equal(alone.mean[0], together.mean[image])
        assert torch.equal(alone.variance[0], together.variance[image])
