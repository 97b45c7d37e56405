"""Draws images/product.svg, a step's Gaussians and their product, by the code that samples images.

python docs/product_of_gaussians.py
"""

from pathlib import Path

import torch
from torch import Tensor

from stepfuse import Gaussian
from stepfuse.data.palette import DARK, LIGHT, Theme
from stepfuse.fuse.diffusion.gaussian import product

PICTURE = Path(__file__).parent / "images" / "product.svg"
BASE = Gaussian(mean=torch.tensor([[0.0]]), variance=torch.tensor([[1.0]]))
ADAPTERS = (
    Gaussian(mean=torch.tensor([[-1.4]]), variance=torch.tensor([[0.7]])),
    Gaussian(mean=torch.tensor([[1.6]]), variance=torch.tensor([[0.3]])),
)
WEIGHTS = (0.5, 0.5)
X = torch.linspace(-4, 4, 401)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 330, 24, 736, 28, 282
TALLEST = 0.85  # density at the top of the picture


def colours(theme: Theme) -> str:
    """The picture's colours as declarations of CSS variables; each curve also has its own dashes and label."""
    names = ("ground", "ink", "base", "first", "second", "product")
    found = (theme.paper, theme.ink, theme.soft, *theme.series[:3])
    return " ".join(f"--{name}: {colour};" for name, colour in zip(names, found, strict=True))


STYLE = f"""
svg {{ {colours(LIGHT)} }}
@media (prefers-color-scheme: dark) {{
svg {{ {colours(DARK)} }}
}}
text {{ font: 15px Helvetica, Arial, sans-serif; fill: var(--ink); }}
path {{ fill: none; stroke-width: 2.2; }}
"""


def fused(strength: float) -> Gaussian:
    """The product with exponents a_i = λ w_i of the adapters, and 1 - Σ a_i of the base."""
    a = [strength * weight for weight in WEIGHTS]
    return product([BASE, *ADAPTERS], torch.tensor([1 - sum(a), *a]))


def density(gaussian: Gaussian, x: Tensor = X) -> Tensor:
    """p(x) at many points of the one dimension."""
    many = Gaussian(mean=gaussian.mean.expand(len(x), 1), variance=gaussian.variance.expand(len(x), 1))
    return many.log_prob(x[:, None]).exp()


def curve(gaussian: Gaussian, colour: str, dashes: str, label: str, dx: float = 0, anchor: str = "middle") -> str:
    """One density, with its label at the top, moved by `dx` pixels."""
    values = density(gaussian)
    points = " ".join(f"{_across(x):.1f} {_up(y):.1f}" for x, y in zip(X.tolist(), values.tolist(), strict=True))
    top = int(values.argmax())
    place = f'x="{_across(float(X[top])) + dx:.0f}" y="{_up(float(values[top])) - 9:.0f}" text-anchor="{anchor}"'
    line = f'<path d="M {points}" stroke="var(--{colour})" stroke-dasharray="{dashes}"/>'
    return f"{line}\n<text {place}>{label}</text>"


def _across(x: float) -> float:
    return LEFT + (x - float(X[0])) / float(X[-1] - X[0]) * (RIGHT - LEFT)


def _up(y: float) -> float:
    return BOTTOM - y / TALLEST * (BOTTOM - TOP)


def picture() -> str:
    first, second = ADAPTERS
    curves = [
        curve(BASE, "base", "2 4", "base", -4),
        curve(first, "first", "9 4", "first adapter", -30),
        curve(second, "second", "9 4 2 4", "second adapter", 26, "start"),
        curve(fused(1.0), "product", "none", "product, λ = 1", -22, "end"),
        curve(fused(1.5), "product", "4 3", "λ = 1.5", -4),
    ]
    numbers = {x: str(x).replace("-", "−") for x in range(-3, 4)}
    ticks = [
        f'<text x="{_across(x):.0f}" y="{BOTTOM + 20}" text-anchor="middle">{n}</text>' for x, n in numbers.items()
    ]
    axis = f'<path d="M {LEFT} {BOTTOM} H {RIGHT}" stroke="var(--ink)" style="stroke-width: 1"/>'
    name = f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">next latent, one dimension</text>'
    title = "Densities of the base, of two adapters, and of their products with strength 1 and 1.5"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" style="fill: var(--ground)"/>'
    parts = [f'{head} role="img" aria-labelledby="title">', f'<title id="title">{title}</title>']
    return "\n".join([*parts, f"<style>{STYLE}</style>", ground, axis, *ticks, name, *curves, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
