"""What a network is given besides the latent and the time."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.weak import WeakIdKeyDictionary

from stepfuse.data.devices import on_host

Inputs = Mapping[str, Tensor]  # by name, a row an image
_HOST_COPIES: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Embeddings of prompts and of negative prompts, and whatever else a network is given: a row an image.

    Both have the same names, those of the backbone that encoded the prompts, which alone reads them.
    """

    positive: Inputs
    negative: Inputs

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        return Conditioning(positive=input_rows(self.positive, rows), negative=input_rows(self.negative, rows))

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(
            positive={name: value.to(device) for name, value in self.positive.items()},
            negative={name: value.to(device) for name, value in self.negative.items()},
        )

    def repeat(self, count: int) -> "Conditioning":
        """Every row `count` times, one after the other: a a b b."""
        return Conditioning(
            positive={name: value.repeat_interleave(count, 0) for name, value in self.positive.items()},
            negative={name: value.repeat_interleave(count, 0) for name, value in self.negative.items()},
        )

    def inputs(self, kinds: str) -> dict[str, Tensor]:
        """The tensors under `+` (positive), `-` (negative), or `-+` (both, stacked in that order)."""
        return stack([self.of(kind) for kind in kinds])

    def of(self, kind: str) -> Inputs:
        """The tensors under `+` (positive) or `-` (negative)."""
        return self.positive if kind == "+" else self.negative


def host_copy(mask: Tensor) -> Tensor:
    """A mask on the host, for which a device is waited for once: the inputs of a run's steps are the same tensors."""
    if on_host(mask):
        return mask  # a copy of it that is kept would be itself, and never be forgotten
    if mask not in _HOST_COPIES:
        _HOST_COPIES[mask] = mask.cpu()
    return _HOST_COPIES[mask]


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of several as those of one."""
    return Conditioning(
        positive=stack([part.positive for part in parts]), negative=stack([part.negative for part in parts])
    )


def stack(parts: Sequence[Inputs]) -> dict[str, Tensor]:
    """Rows of several batches as those of one.

    Where the second dimension, that of tokens, differs, the shorter ones are padded with zeros at their end; a mask is
    padded so too, and says which tokens count.
    """
    return {name: _stack([part[name] for part in parts]) for name in parts[0]}


def input_rows(inputs: Inputs, rows: slice | Tensor) -> dict[str, Tensor]:
    """The tensors of some rows of a batch."""
    return {name: value[rows] for name, value in inputs.items()}


def _stack(values: Sequence[Tensor]) -> Tensor:
    if len({value.shape[1:] for value in values}) > 1:
        return pad_sequence([row for value in values for row in value], batch_first=True)
    return torch.cat(list(values))
