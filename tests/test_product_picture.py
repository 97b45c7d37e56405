"""docs/images/product.svg shows densities that are computed right, and is what its program draws."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepfuse.data.palette import DARK, LIGHT

PROGRAM = Path(__file__).parents[1] / "docs" / "product_of_gaussians.py"


@pytest.fixture(scope="module")
def drawing() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


@pytest.mark.parametrize("strength", [0.0, 1.0, 1.5])
def test_the_product_is_the_normalised_product_of_the_densities_at_every_point(
    drawing: SimpleNamespace, strength: float
) -> None:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    base, first, second = (drawing.density(each, x) for each in (drawing.BASE, *drawing.ADAPTERS))
    a = strength * 0.5  # equal weights
    unnormalised = base ** (1 - 2 * a) * first**a * second**a
    expected = unnormalised / torch.trapezoid(unnormalised, x)
    torch.testing.assert_close(drawing.density(drawing.fused(strength), x), expected, rtol=1e-5, atol=1e-7)


def test_the_picture_is_what_the_program_draws(drawing: SimpleNamespace) -> None:
    number = re.compile(r"\d+\.\d+")
    kept, drawn = drawing.PICTURE.read_text(encoding="utf-8"), drawing.picture()
    assert number.sub("#", kept) == number.sub("#", drawn)
    ours, theirs = ([float(value) for value in number.findall(text)] for text in (kept, drawn))
    assert ours == pytest.approx(theirs, abs=0.11)  # a last digit may be rounded the other way


def test_its_colours_are_those_of_the_palette(drawing: SimpleNamespace) -> None:
    light, dark = drawing.PICTURE.read_text(encoding="utf-8").split("@media (prefers-color-scheme: dark)")
    for text, theme in ((light, LIGHT), (dark, DARK)):
        assert re.findall("#[0-9a-f]{6}", text) == [theme.paper, theme.ink, theme.soft, *theme.series[:3]]


def test_the_curves_fit_into_the_picture(drawing: SimpleNamespace) -> None:
    for gaussian in (drawing.BASE, *drawing.ADAPTERS, drawing.fused(1.0), drawing.fused(1.5)):
        assert float(drawing.density(gaussian).max()) < drawing.TALLEST
