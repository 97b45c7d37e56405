"""Rewards that are functions of the pixels, against scikit-image, numpy and arithmetic in sight."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from stepfuse.rewards.contrast import contrast
from stepfuse.rewards.lightness import lightness
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.rewards.subject_size import subject_size
from stepfuse.rewards.symmetry import symmetry
from stepfuse.rewards.warmth import warmth

ALL = [lightness, warmth, contrast, symmetry, subject_size]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def square(side: int, *, colour: float, background: float) -> torch.Tensor:
    """A grey square in the middle of a grey image of 64 × 64 pixels."""
    image = torch.full((1, 3, 64, 64), background)
    start = (64 - side) // 2
    image[:, :, start : start + side, start : start + side] = colour
    return image


def test_lightness_is_that_of_scikit_image() -> None:
    images = torch.cat([noise(2, 3, 24, 16), noise(1, 3, 24, 16, seed=1) * 0.01])  # the last is near black
    expected = [rgb2lab(image.permute(1, 2, 0).numpy())[..., 0].mean() for image in images]
    assert lightness(images, [""] * 3).tolist() == pytest.approx(expected, abs=1e-3)
    black_and_white = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 4, 4)
    assert lightness(black_and_white, [""] * 2).tolist() == pytest.approx([0, 100], abs=1e-4)


def test_warmth_is_red_minus_blue() -> None:
    image = torch.tensor([200.0, 17.0, 80.0])[None, :, None, None].expand(1, 3, 2, 2) / 255
    assert warmth(image, [""]).item() == pytest.approx(120, abs=1e-4)


def test_contrast_is_the_deviation_of_the_luma() -> None:
    image = noise(1, 3, 9, 7)
    luma = np.einsum("chw,c->hw", image[0].double().numpy(), [0.299, 0.587, 0.114])
    assert contrast(image, [""]).item() == pytest.approx(100 * luma.std(), rel=1e-5)
    halves = square(64, colour=0.0, background=0.0)
    halves[..., 32:] = 1
    assert contrast(halves, [""]).item() == pytest.approx(50, rel=1e-5)


def test_symmetry_is_zero_for_a_mirror_image_of_itself() -> None:
    half = noise(1, 3, 8, 4)
    whole = torch.cat([half, half.flip(3)], dim=3)
    assert symmetry(whole, [""]).item() == 0
    assert symmetry(torch.cat([half * 0, half * 0 + 1], dim=3), [""]).item() == -100


@pytest.mark.parametrize(("side", "expected"), [(0, 0), (16, 100 / 16), (32, 25)])
def test_subject_size_is_the_share_of_other_pixels(side: int, expected: float) -> None:
    """A square of half the width is a quarter of the image; a difference up to 0.15 is the background's."""
    assert subject_size(square(side, colour=0.9, background=0.2), [""]).item() == pytest.approx(expected, abs=1e-4)
    assert subject_size(square(side, colour=0.3, background=0.2), [""]).item() == 0
    halfway = subject_size(square(side, colour=0.425, background=0.2), [""]).item()
    assert halfway == pytest.approx(expected / 2, abs=1e-3)


@pytest.mark.parametrize("reward", ALL)
def test_scores_of_a_batch_are_those_of_each_image(reward: Callable[[Pixels, list[str]], Scores]) -> None:
    images = noise(3, 3, 32, 32)
    alone = torch.cat([reward(image[None], [""]) for image in images])
    torch.testing.assert_close(reward(images, [""] * 3), alone)


@pytest.mark.parametrize("reward", ALL)
def test_gradients_are_the_slope_and_finite_for_flat_images(reward: Callable[[Pixels, list[str]], Scores]) -> None:
    images = noise(2, 3, 12, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, [""] * 2).sum(), images)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        change = (reward(images + step, [""] * 2) - reward(images - step, [""] * 2)).sum() / 2
    assert change.item() == pytest.approx((gradient * step).sum().item(), rel=0.05)
    flat = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)]).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(flat, [""] * 2).sum(), flat)
    assert gradient.isfinite().all()
