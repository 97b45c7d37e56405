"""The prompts that a step trains on, and their embeddings."""

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning, Inputs, join
from stepfuse.fuse.backbones.prompt_length import cut_prompts, warn_of_cuts
from stepfuse.train.rollout import sample_generator

CACHED = 4 * 2**30  # most bytes; a prompt of SDXL has 0.3 MB in bf16, and one of FLUX.2 16 MB
logger = logging.getLogger(__name__)


class Embeddings:
    """Embeddings of prompts by a base model's text encoders, which are cached in the memory of the host.

    For a GPU it is pinned, so that known embeddings are uploaded without a wait. Of the negative prompt there is one
    row for all prompts. Beyond `CACHED` bytes the prompts that were not asked for the longest are forgotten.

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
        self.pinned = torch.device(device).type == "cuda"
        for name, part in backbone.pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                part.to(self.encoders_on if name.startswith("text_encoder") else device)
        self._known: OrderedDict[str, Conditioning] = OrderedDict()
        self._negative: Inputs | None = None  # that of the rows
        self._bytes = 0  # of the rows, without it

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt."""
        rows = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        parts = {id(part): part for row in rows.values() for part in (row.positive, row.negative)}
        sent = {
            key: {name: to_device(value, self.device) for name, value in part.items()} for key, part in parts.items()
        }
        pairs = [(rows[prompt].positive, rows[prompt].negative) for prompt in prompts]
        return join([Conditioning(positive=sent[id(one)], negative=sent[id(other)]) for one, other in pairs])

    @property
    def cached_bytes(self) -> int:
        """What the cache takes of the host's memory."""
        return self._bytes + (0 if self._negative is None else _bytes(self._negative))

    def _row(self, prompt: str) -> Conditioning:
        if prompt in self._known:
            self._known.move_to_end(prompt)
            return self._known[prompt]
        encoded = self._encode(prompt)
        row = self._known[prompt] = Conditioning(
            positive=self._keep(encoded.positive), negative=self._shared(encoded.negative)
        )
        self._bytes += self._own_bytes(row)
        while self._bytes > CACHED:
            _, forgotten = self._known.popitem(last=False)
            self._bytes -= self._own_bytes(forgotten)
        return row

    def _keep(self, inputs: Inputs) -> Inputs:
        on_host = {name: value.cpu() for name, value in inputs.items()}
        return {name: value.pin_memory() for name, value in on_host.items()} if self.pinned else on_host

    def _shared(self, inputs: Inputs) -> Inputs:
        """The negative inputs, as one object for all prompts where they are the same."""
        given, known = {name: value.cpu() for name, value in inputs.items()}, self._negative
        if known is None:
            known = self._negative = self._keep(given)
        same = known.keys() == given.keys() and all(torch.equal(value, known[name]) for name, value in given.items())
        return known if same else self._keep(given)

    def _own_bytes(self, row: Conditioning) -> int:
        return _bytes(row.positive) + (0 if row.negative is self._negative else _bytes(row.negative))

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


def _bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values())


def prompt_order(seed: int, size: int, step: int, count: int) -> list[int]:
    """The indices of a step's `count` prompts among `size`, by shuffled passes over all of them."""
    positions = range(step * count, (step + 1) * count)
    passes = {
        p: torch.randperm(size, generator=sample_generator(seed, "prompts", p)).tolist()
        for p in {position // size for position in positions}
    }
    return [passes[position // size][position % size] for position in positions]
