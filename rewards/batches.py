"""Scores of many images, a few at a time."""

from collections.abc import Callable, Sequence

import torch

from stepfuse.rewards.protocol import Pixels, Scores


def score_in_batches(
    scores: Callable[[Pixels, Sequence[str]], Scores], images: Pixels, prompts: Sequence[str], batch_size: int
) -> Scores:
    """Without a gradient, `batch_size` images a call, so that memory does not grow with the batch; with one, all."""
    if images.requires_grad and torch.is_grad_enabled():
        return scores(images, prompts)
    with torch.no_grad():
        parts = [
            scores(images[first : first + batch_size], prompts[first : first + batch_size])
            for first in range(0, len(images), batch_size)
        ]
    return torch.cat(parts) if parts else torch.zeros(0, device=images.device)
