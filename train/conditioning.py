"""The prompts that a step trains on, and their embeddings."""

import logging
from collections.abc import Sequence

import torch

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning, join
from stepfuse.fuse.backbones.prompt_length import cut_prompts, warn_of_cuts
from stepfuse.train.rollout import sample_generator

CACHED = 4 * 2**30  # most bytes; a prompt and its negative one of FLUX.2 have 16 MB in bf16
logger = logging.getLogger(__name__)


class Embeddings:
    """Embeddings of prompts by a base model's text encoders, which are cached on the device of the encoders.

    Args:
        backbone: the base model; the parts of its pipeline are moved to the device.
        offload: keep and run the text encoders on the CPU.
        report_cuts: log prompts that are truncated by the text encoders.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        *,
        offload: bool = False,
        report_cuts: bool = True,
    ) -> None:
        self.backbone, self.device = backbone, device
        self.report_cuts, self._checked, self._cut = report_cuts, set[str](), set[str]()
        self.encoders_on = torch.device("cpu") if offload else device
        for name, part in backbone.pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                part.to(self.encoders_on if name.startswith("text_encoder") else device)
        self._known: dict[str, Conditioning] = {}
        self._bytes = 0

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt."""
        return join([self._row(prompt) for prompt in prompts]).to(self.device)

    def _row(self, prompt: str) -> Conditioning:
        if prompt not in self._known:
            if self._bytes > CACHED:
                self._known.clear()
                self._bytes = 0
            row = self._known[prompt] = self._encode(prompt)
            self._bytes += sum(value.nbytes for part in (row.positive, row.negative) for value in part.values())
        return self._known[prompt]

    def report(self, prompts: Sequence[str]) -> None:
        """Log how many of these prompts are truncated, and the first of them."""
        if self.report_cuts:
            warn_of_cuts(self.backbone, prompts, counted=True)
            self._checked.update(prompts)

    def report_streamed(self) -> None:
        """Log how many other prompts, of a data set that is streamed, were truncated."""
        if len(self._cut) > 1:
            logger.warning("%d prompts of the data set were longer than the text encoder takes", len(self._cut))

    def _encode(self, prompt: str) -> Conditioning:
        if self.report_cuts and prompt not in self._checked and (cut := cut_prompts(self.backbone, [prompt])):
            if not self._cut:
                logger.warning("%s; others are counted", cut[0])
            self._cut.add(prompt)
        return self.backbone.encode([prompt], device=self.encoders_on)


def prompt_order(seed: int, size: int, step: int, count: int) -> list[int]:
    """The indices of a step's `count` prompts among `size`, by shuffled passes over all of them."""
    positions = range(step * count, (step + 1) * count)
    passes = {
        p: torch.randperm(size, generator=sample_generator(seed, "prompts", p)).tolist()
        for p in {position // size for position in positions}
    }
    return [passes[position // size][position % size] for position in positions]
