"""What a network is told besides the latent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet is told besides the latent: a row a sample, positive and negative.

    Attributes:
        positive: prompt embeddings.
        negative: embeddings of the negative prompts.
        added: SDXL's pooled embeddings and size ids, positive and negative; empty elsewhere.
    """

    positive: Float[Tensor, "batch tokens width"]
    negative: Float[Tensor, "batch tokens width"]
    added: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        return Conditioning(
            positive=self.positive[rows],
            negative=self.negative[rows],
            added={k: (p[rows], n[rows]) for k, (p, n) in self.added.items()},
        )

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(
            positive=self.positive.to(device),
            negative=self.negative.to(device),
            added={k: (p.to(device), n.to(device)) for k, (p, n) in self.added.items()},
        )

    def repeat(self, count: int) -> "Conditioning":
        """Every row `count` times, in place: a a b b."""
        return self[torch.arange(len(self.positive)).repeat_interleave(count)]

    def inputs(self, kinds: str) -> dict[str, Any]:
        """UNet arguments for `+` (positive), `-` (negative), or `-+` (both, stacked in that order)."""
        pick = {"+": 0, "-": 1}
        states = (self.positive, self.negative)
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.cat([states[pick[k]] for k in kinds])}
        if self.added:
            inputs["added_cond_kwargs"] = {
                name: torch.cat([pair[pick[k]] for k in kinds]) for name, pair in self.added.items()
            }
        return inputs


def stack_inputs(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """UNet arguments of several batches as those of one."""
    return {
        name: stack_inputs([part[name] for part in parts])
        if isinstance(value, Mapping)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }


def input_rows(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """UNet arguments of some rows of a batch."""
    return {
        name: input_rows(value, rows) if isinstance(value, Mapping) else value[rows] for name, value in inputs.items()
    }
