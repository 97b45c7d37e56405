"""Checks that images are of finite numbers, made once when they are drawn."""

from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Bool, Float
from torch import Tensor

from stepfuse.data.text_files import quoted
from stepfuse.fuse.backbones.base import Backbone, Pixels
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.noise_path import Time

HELP = "nothing is saved; try dtype float32 or bfloat16, a lower guidance scale, or a strength or weights nearer to 1"
HELP_DECODING = (
    "nothing is saved; try dtype float32 or bfloat16, or an autoencoder made for float16, such as "
    "madebyollin/sdxl-vae-fp16-fix"
)
FiniteSteps = list[tuple[Time, Bool[Tensor, ""]]]  # t of each step, and whether its mean was finite


def check_latents(latents: Latents, prompts: Sequence[str], steps: FiniteSteps | None = None) -> None:
    """Check that final latents are finite; a ValueError names the images, the first step at fault, and what to try."""
    if bad := _not_finite(latents):
        raise ValueError(f"{_named(bad, prompts)} not finite{_first(steps or [])}; {HELP}")


def decode_finite(backbone: Backbone, latents: Latents, prompts: Sequence[str]) -> Pixels:
    """Finite latents → pixels in [0, 1], checked before they are clamped; a ValueError names the images."""
    pixels = backbone.decode_unclamped(latents)
    if bad := _not_finite(pixels):
        raise ValueError(
            f"{_named(bad, prompts)} not finite although the latents are: the autoencoder's decoder overflows; "
            f"{HELP_DECODING}"
        )
    return VaeImageProcessor.denormalize(pixels)


def _not_finite(values: Float[Tensor, "batch *shape"]) -> list[int]:
    finite = torch.isfinite(values).flatten(1).all(1).tolist()
    return [row for row, whole in enumerate(finite) if not whole]


def _named(rows: Sequence[int], prompts: Sequence[str]) -> str:
    texts = {prompts[row]: None for row in rows}
    count = "the image" if len(rows) == 1 else f"{len(rows)} images"
    noun, verb = "prompt" if len(texts) == 1 else "prompts", "is" if len(rows) == 1 else "are"
    return f"{count} of {noun} {quoted(texts)} {verb}"


def _first(steps: FiniteSteps) -> str:
    for number, (t, finite) in enumerate(steps, 1):
        if not finite:
            return f" from step {number} of {len(steps)} on, at time {t:g}"
    return " after the last step" if steps else ""
