"""The images of one batch, and what a metric may ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.sampling.sampler import BatchObserver, FusedSampler
from stepfuse.scripts.evaluation.config import PlannedCell
from stepfuse.scripts.evaluation.costs import counted_rows, now, peak_memory
from stepfuse.scripts.evaluation.prepare import Evaluation


@dataclass(frozen=True, kw_only=True)
class MetricBatch:
    """Images of one cell: all seeds of some prompts, those of one prompt after each other.

    Attributes:
        evaluation: with the configuration, the rewards and the CLIP model.
        sampler: with the cell's rule.
        images: prompt and index of the seed of each image.
        pixels: in [0, 1], on the CPU.
        forwards, seconds: network evaluations and time of the whole batch.
        peak_memory_mb: while it was sampled; NaN where it cannot be measured.
    """

    evaluation: Evaluation
    cell: PlannedCell
    sampler: FusedSampler
    images: Sequence[tuple[str, int]]
    pixels: Float[Tensor, "images 3 height width"]
    forwards: int
    seconds: float
    peak_memory_mb: float

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.images]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, seed in self.images]

    def sample_again(self, indices: Sequence[int], observe: BatchObserver) -> None:
        """Sample some of the images again, and show every step to an observer."""
        images = [self.images[i] for i in indices]
        self.evaluation.sample(self.sampler, self.cell, images, output_type="latent", observe=observe)


@torch.no_grad()
def sample_batch(evaluation: Evaluation, cell: PlannedCell, rows: range) -> MetricBatch:
    """All images of the prompts with these indices in one cell."""
    images = [(evaluation.prompts[i], seed) for i in rows for seed in range(evaluation.config.seeds_per_prompt)]
    sampler, device = evaluation.sampler_of(cell), evaluation.device
    with counted_rows(sampler.denoiser.network) as counted, peak_memory(device) as peak:
        begin = now(device)
        pixels = evaluation.sample(sampler, cell, images, output_type="pt")
        seconds = now(device) - begin
    costs = {"forwards": counted["rows"], "seconds": seconds, "peak_memory_mb": peak()}
    return MetricBatch(evaluation=evaluation, cell=cell, sampler=sampler, images=images, pixels=pixels, **costs)
