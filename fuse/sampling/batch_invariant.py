"""What else is done an image at a time where images do not depend on their batch, see `Denoiser.batch_invariant`."""

from collections.abc import Sequence

import torch

from stepfuse.fuse.backbones.base import Backbone, Pixels
from stepfuse.fuse.backbones.conditioning import Conditioning, join
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.sampling.finite import decode_finite


def check_invariant(rule: FusionRule) -> None:
    """Check that a rule needs no rewards, which are computed in batches."""
    if rule.needs:
        raise ValueError(f"rule {rule.name} scores images in batches, which batch_invariant excludes; use another rule")


def encode_each(
    backbone: Backbone,
    prompts: Sequence[str],
    negatives: Sequence[str | None],
    *,
    height: int | None = None,
    width: int | None = None,
) -> Conditioning:
    """Embed prompts one at a time.

    Raises:
        ValueError: for prompts of different lengths, where the model family pads them to the longest of a batch.
    """
    each = [
        backbone.encode([prompt], [negative], height=height, width=width)
        for prompt, negative in zip(prompts, negatives, strict=True)
    ]
    for name in each[0].positive:
        if len({part.of(kind)[name].shape for part in each for kind in "+-"}) > 1:
            raise ValueError(
                "batch_invariant, and these prompts and negative prompts have different numbers of tokens, which this "
                "model pads to the longest of a batch; use prompts of one length"
            )
    return join(each)


def decode_each(backbone: Backbone, latents: Latents, prompts: Sequence[str]) -> Pixels:
    """`decode_finite`, an image at a time."""
    return torch.cat([decode_finite(backbone, latents[[row]], [prompt]) for row, prompt in enumerate(prompts)])
