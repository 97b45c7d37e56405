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
    kinds_together: Sequence[str],
    prompts: Sequence[str],
    negatives: Sequence[str | None],
    *,
    height: int | None = None,
    width: int | None = None,
) -> Conditioning:
    """Embed prompts one at a time; equal ones once.

    Args:
        kinds_together: of embeddings whose rows go through one forward, see `Denoiser.kinds_together`.

    Raises:
        ValueError: for prompts of different lengths, where the model family pads them to the longest of a batch.
    """
    pairs = list(zip(prompts, negatives, strict=True))
    known = {pair: backbone.encode([pair[0]], [pair[1]], height=height, width=width) for pair in dict.fromkeys(pairs)}
    for kinds in kinds_together:
        for name in next(iter(known.values())).positive:
            if len({part.of(kind)[name].shape for part in known.values() for kind in kinds}) > 1:
                raise ValueError(
                    "batch_invariant, and these prompts and negative prompts have different numbers of tokens, which "
                    "this model pads to the longest of a batch; use prompts of one length"
                )
    return join([known[pair] for pair in pairs])


def decode_each(backbone: Backbone, latents: Latents, prompts: Sequence[str]) -> Pixels:
    """`decode_finite`, an image at a time."""
    return torch.cat([decode_finite(backbone, latents[[row]], [prompt]) for row, prompt in enumerate(prompts)])
