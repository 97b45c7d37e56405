"""Forwards that several runs share: rows of any adapters, mixtures, times and guidance in one batch."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import stack
from stepfuse.fuse.backbones.denoiser import ForwardRows
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.row_counts import padded
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.sampling.equal_counts import candidates, find_equal_counts

Shapes = tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True)
class SharedForward:
    """What one forward took.

    Attributes:
        outputs: raw predictions of the rows that were given, in float32 or wider.
        padding: rows that were computed in vain.
    """

    outputs: Latents
    padding: int


class SharedForwards:
    """A network that several runs share, with forwards of a few numbers of rows.

    Every row is a mixture of all the adapters, Σ_i c_i s_i B_i A_i: one adapter has c = 1, the base c = 0. So a row is
    computed in the same way whatever the others of its forward are.

    Args:
        backbone: the model.
        adapters: all that runs may ask for.
        max_rows: the most rows of a forward.
        exact: only numbers of rows whose forwards give a row the same bits, which `calibrate` finds for rows of one
            shape; rows of a shape that it has not seen go one at a time. Otherwise all numbers of `candidates`.
    """

    def __init__(self, backbone: Backbone, adapters: BatchedAdapters, *, max_rows: int, exact: bool) -> None:
        self.backbone, self.adapters = backbone, adapters
        self.max_rows, self.exact = max_rows, exact
        self._counts: dict[Shapes, list[int]] = {}
        self._limits: dict[Shapes, int] = {}
        adapters.fix(max_rows, backbone.device)

    def shapes(self, rows: ForwardRows) -> Shapes:
        """What rows of one forward have in common: shapes and types, and how the adapters of a row are combined."""
        inputs = sorted((name, tuple(value.shape[1:]), value.dtype) for name, value in rows.inputs.items())
        return tuple(rows.x.shape[1:]), rows.x.dtype, tuple(inputs), self._network(rows.network).merge

    def run(self, pieces: Sequence[ForwardRows]) -> SharedForward:
        """One forward of rows with the same `shapes`, together no more than `largest` of them.

        Raises:
            ValueError: for a merged DoRA, which is not linear in its weight.
        """
        rows = sum(map(len, pieces))
        count = self.count_for(pieces[0], rows)
        return SharedForward(outputs=self._forward(pieces, count)[:rows], padding=count - rows)

    def count_for(self, like: ForwardRows, rows: int) -> int:
        """The rows of the forward that so many are padded to."""
        return next(count for count in self.counts(like) if count >= rows)

    def largest(self, rows: ForwardRows) -> int:
        """The most rows of a forward that these are part of."""
        return self.counts(rows)[-1]

    def counts(self, rows: ForwardRows) -> list[int]:
        """The numbers of rows that a forward of rows like these may have, in ascending order."""
        shapes = self.shapes(rows)
        known = self._counts.get(shapes, [1] if self.exact else candidates(self.max_rows))
        return [count for count in known if count <= self._limits.get(shapes, self.max_rows)] or known[:1]

    def limit(self, like: ForwardRows, rows: int) -> None:
        """Forwards of rows like these have at most so many from now on, because more did not fit into the memory."""
        self._limits[self.shapes(like)] = max(1, rows)

    def calibrate(self, rows: ForwardRows) -> None:
        """Find the numbers of rows, for rows like these, whose forwards give a row the same bits, by running them."""
        if self.exact and self.shapes(rows) not in self._counts:
            self._counts[self.shapes(rows)] = find_equal_counts(self._probe(rows), candidates(self.max_rows))

    def _probe(self, rows: ForwardRows) -> Callable[[Sequence[int]], Latents]:
        """A forward of some of as many rows as there may be, which differ in latents, embeddings and mixtures."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.max_rows, *rows.x.shape[1:], generator=generator).to(rows.x)
        inputs = [
            {name: v * (1 + k / self.max_rows) if v.is_floating_point() else v for name, v in rows[:1].inputs.items()}
            for k in range(self.max_rows)
        ]
        pieces = [
            ForwardRows(x=x[k : k + 1], times=rows.times[:1], inputs=inputs[k], network=network)
            for k, network in enumerate(self._probe_networks(rows.network, generator))
        ]
        return lambda some: self._forward([pieces[k] for k in some], len(some))

    def _probe_networks(self, like: Network, generator: torch.Generator) -> list[Network]:
        """Mixtures of all adapters, or one adapter each where they cannot be mixed."""
        names = self.adapters.names
        if not self.adapters.are_mixed:
            return [Network.of(names[k % len(names)]) for k in range(self.max_rows)]
        weights = torch.rand(self.max_rows, len(names), generator=generator).tolist()
        return [Network.merged(dict(zip(names, row, strict=True)), like.merge or "weights") for row in weights]

    def _forward(self, pieces: Sequence[ForwardRows], count: int) -> Latents:
        networks = [self._network(piece.network) for piece in pieces for _ in range(len(piece))]
        networks += networks[-1:] * (count - len(networks))
        x = padded(torch.cat([piece.x for piece in pieces]), count)
        times = padded(torch.cat([piece.times for piece in pieces]), count)
        inputs = {name: padded(v, count) for name, v in stack([piece.inputs for piece in pieces]).items()}
        if self.backbone.records_graphs:  # see `Denoiser`
            torch.compiler.cudagraph_mark_step_begin()
        with self.adapters.routed(self.adapters.route_of(networks, x.device)):
            return self.backbone.predict(x, times, inputs)

    def _network(self, network: Network) -> Network:
        """A network as a mixture, where adapters can be mixed."""
        if network.merge or not self.adapters.are_mixed:
            return network
        return Network.merged(dict(network.weights))


def split(outputs: Latents, pieces: Sequence[ForwardRows]) -> list[Latents]:
    """The rows of a forward's output by piece, each a copy, so that none keeps the others in memory."""
    ends = list(accumulate(map(len, pieces)))
    return [outputs[end - len(piece) : end].clone() for piece, end in zip(pieces, ends, strict=True)]
