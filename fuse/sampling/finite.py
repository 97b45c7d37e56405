"""The check that images are of finite numbers, once when they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import Time

HELP = "nothing is saved; try dtype float32 or bfloat16, a lower guidance scale, or a strength or weights nearer to 1"
HELP_DECODING = (
    "nothing is saved; try dtype float32 or bfloat16, or an autoencoder made for float16, such as "
    "madebyollin/sdxl-vae-fp16-fix"
)


@dataclass(frozen=True, kw_only=True)
class FiniteSteps:
    """Whether each step was finite, kept on the device until it is asked for.

    Attributes:
        flags: t of each step, and whether the mean of its Gaussian was finite throughout.
    """

    flags: list[tuple[Time, Bool[Tensor, ""]]] = field(default_factory=list)

    def note(self, t: Time, gaussian: Gaussian) -> None:
        self.flags.append((t, torch.isfinite(gaussian.mean).all()))

    def first(self) -> str:
        """The first step that was not finite, in words."""
        if not self.flags:
            return ""
        finite = torch.stack([flag for _, flag in self.flags]).tolist()
        if all(finite):
            return " after the last step"
        number = finite.index(False)
        return f" from step {number + 1} of {len(finite)} on, at time {self.flags[number][0]:g}"


def check_latents(
    latents: Float[Tensor, "batch *shape"], prompts: Sequence[str], steps: FiniteSteps | None = None
) -> None:
    """Check that final latents are finite.

    Raises:
        ValueError: naming the images, the step and what to try.
    """
    if bad := _not_finite(latents):
        raise ValueError(f"{_named(bad, prompts)} not finite{steps.first() if steps else ''}; {HELP}")


def check_pixels(pixels: Float[Tensor, "batch *shape"], prompts: Sequence[str]) -> None:
    """Check that what an autoencoder decoded of finite latents is finite; before it is clamped.

    Raises:
        ValueError: naming the images and what to try.
    """
    if bad := _not_finite(pixels):
        raise ValueError(
            f"{_named(bad, prompts)} not finite although the latents are: the autoencoder's decoder overflows; "
            f"{HELP_DECODING}"
        )


def _not_finite(values: Tensor) -> list[int]:
    finite = torch.isfinite(values).flatten(1).all(1).tolist()
    return [row for row, good in enumerate(finite) if not good]


def _named(rows: Sequence[int], prompts: Sequence[str]) -> str:
    texts = list(dict.fromkeys(prompts[row] for row in rows))
    shown = ", ".join(repr(text) for text in texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
    count = "the image" if len(rows) == 1 else f"{len(rows)} images"
    return f"{count} of {'prompt' if len(texts) == 1 else 'prompts'} {shown} {'is' if len(rows) == 1 else 'are'}"
