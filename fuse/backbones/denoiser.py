"""Guided predictions of the base and of its adapters, from one network."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepfuse.data.devices import on_host, to_device
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning, Inputs, input_rows, stack
from stepfuse.fuse.backbones.guidance import Branch, Guidance, Latents, SomeRows
from stepfuse.fuse.backbones.row_counts import padded, row_counts
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.lora.layers import active_adapter, averaged_factors, merged_adapters
from stepfuse.fuse.lora.mixture import BASE, Network, Rows


class Router(Protocol):
    """What runs several networks in one forward, each on rows of its own."""

    network: nn.Module

    def route_of(self, networks: Sequence[Network], device: torch.device) -> Any:
        """The route of rows with these networks, those of the base first."""
        ...

    def routed(self, route: Any) -> AbstractContextManager[None]:
        """The network on a batch of such rows."""
        ...

    @property
    def fixed(self) -> bool:
        """Whether routes are kept in the same tensors."""
        return False

    def fix(self, rows: int, device: torch.device) -> None:
        """Keep routes of up to so many rows in tensors that stay where they are, as compiled networks want them."""
        return

    def release(self) -> None:
        """Give back the memory of merged weights, where there are any."""
        return


@dataclass(frozen=True, kw_only=True)
class ForwardRows:
    """Rows of a forward that run one network.

    Attributes:
        x: their latents.
        times: of the network, one a row.
        inputs: what else the network is given, a row a latent.
        network: the base, one adapter, or several that are merged.
    """

    x: Latents
    times: Tensor
    inputs: Inputs
    network: Network

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> "ForwardRows":
        return replace(self, x=self.x[rows], times=self.times[rows], inputs=input_rows(self.inputs, rows))


@dataclass(frozen=True, kw_only=True)
class Guided:
    """Guided predictions, one a network, and e_u of the base where all of them have it in common."""

    predictions: list[Latents]
    negative: Latents | None


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A network with LoRAs on it, and the guidance that makes its prediction a policy.

    Attributes:
        backbone: the model; the base is its network with all adapters off.
        path: its noise path.
        guidance: what makes guided predictions of raw ones.
        batched: what runs the adapters in one forward; by default each has a forward of its own.
        rows_at_once: the most rows in one forward: less memory, more forwards. By default no limit.
        batch_invariant: every forward has exactly `rows_at_once` rows, so that kernels, which are chosen by shapes, are
            the same for an image whatever others it is denoised with.
        forward_fn: runs the forwards in place of this denoiser; several runs may share it.

    Raises:
        ValueError: for no rows at once, batch_invariant without their number, or adapters of another network.
    """

    backbone: Backbone
    path: NoisePath
    guidance: Guidance = field(default_factory=Guidance)
    batched: Router | None = None
    rows_at_once: int | None = None
    batch_invariant: bool = False
    forward_fn: Callable[[Sequence[ForwardRows]], list[Latents]] | None = field(default=None, repr=False, compare=False)
    _kept: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rows_at_once is not None and not self.rows_at_once >= 1:
            raise ValueError(f"rows_at_once {self.rows_at_once}; expected 1 or more")
        if self.batch_invariant and self.rows_at_once is None:
            raise ValueError("batch_invariant needs rows_at_once, the number of rows of every forward")
        self.backbone.check_guidance(self.guidance)
        if self.batched is not None and self.batched.network is not self.network:
            raise ValueError(
                "the batched adapters are of another network; give BatchedAdapters(network, names), or None"
            )

    @property
    def network(self) -> Any:
        return self.backbone.network

    @property
    def kinds_together(self) -> Sequence[str]:
        """The kinds of embeddings, `+` and `-`, whose rows go through one forward, and are padded to one length."""
        if not self.guidance.subtracts:
            return ["+"]
        return ["+-"] if self.forward_fn is None else ["+", "-"]  # a `forward_fn` keeps rows of other shapes apart

    def for_run(self) -> "Denoiser":
        """The same for one run on one thread, whose network inputs are kept from step to step."""
        return replace(self, _kept={})

    def predictions(
        self, x_t: Latents, t: Time, conditioning: Conditioning, networks: Sequence[Network], rows: SomeRows = None
    ) -> list[Latents]:
        """Guided predictions at (x_t, t), one a network, each for these rows of x_t."""
        branches = self._branches(x_t, networks, rows)
        return self.combine(branches, self.run(x_t, t, conditioning, branches))

    def guided(
        self,
        x_t: Latents,
        t: Time,
        conditioning: Conditioning,
        networks: Sequence[Network],
        rows: SomeRows = None,
        *,
        negative: Latents | None = None,
    ) -> Guided:
        """Guided predictions, each for these rows, with what another call at (x_t, t) need not compute again.

        Args:
            negative: of an earlier call there; a ValueError where predictions have none in common.
        """
        if negative is not None and not self.guidance.shares:
            raise ValueError(f"guidance {self.guidance} has no e_u in common that an earlier call could give")
        branches = self._branches(x_t, networks, rows)
        known = [] if negative is None else [negative]
        outputs = [*known, *self.run(x_t, t, conditioning, branches[len(known) :])]
        shared = outputs[0] if self.guidance.shares else None
        return Guided(predictions=self.combine(branches, outputs), negative=shared)

    def _branches(self, x_t: Latents, networks: Sequence[Network], rows: SomeRows) -> list[Branch]:
        """What guidance needs, with the rows where x_t is."""
        if rows is not None:
            rows = [None if some is None else to_device(some, x_t.device) for some in rows]
        return self.guidance.branches(networks, rows)

    def combine(self, branches: Sequence[Branch], outputs: Sequence[Latents]) -> list[Latents]:
        """Guided predictions of the raw ones of `guidance.branches`."""
        return self.guidance.combine(branches, outputs, self.backbone.guide)

    def run(self, x_t: Latents, t: Time, conditioning: Conditioning, branches: Sequence[Branch]) -> list[Latents]:
        """Raw predictions of branches, in float32 or wider: a forward for each network, or one if they are batched."""
        if self.forward_fn is not None:
            return self.forward_fn([self.rows_of(branch, x_t, t, conditioning) for branch in branches])
        groups: dict[Any, list[int]] = {}
        for index, branch in enumerate(branches):
            alone = self.batched is None or branch.network == BASE
            groups.setdefault(branch.network if alone else branch.network.merge, []).append(index)
        if self.batched is not None and BASE in groups and len(groups) > 1:  # the base goes with any
            base = groups.pop(BASE)
            groups[next(iter(groups))][:0] = base
        outputs: dict[int, Latents] = {}
        for indices in groups.values():
            together = [branches[index] for index in indices]
            outputs |= zip(indices, self._forward(x_t, t, conditioning, together), strict=True)
        return [outputs[index] for index in range(len(branches))]

    def rows_of(self, branch: Branch, x_t: Latents, t: Time, conditioning: Conditioning) -> ForwardRows:
        """What a forward is given for one branch."""
        rows: slice | Rows = slice(None) if branch.rows is None else to_device(branch.rows, x_t.device)
        x = x_t[rows]
        inputs = input_rows(conditioning.of(branch.kind), rows) | self.backbone.guidance_inputs(self.guidance, x)
        return ForwardRows(x=x, times=self._times(t, x_t, [rows]), inputs=inputs, network=branch.network)

    def _forward(self, x_t: Latents, t: Time, conditioning: Conditioning, branches: Sequence[Branch]) -> list[Latents]:
        """Branches of one network, stacked; in several forwards only where `rows_at_once` says so."""
        rows: list[slice | Rows] = [
            slice(None) if branch.rows is None else to_device(branch.rows, x_t.device) for branch in branches
        ]
        parts = [x_t[some] for some in rows]
        networks = [branch.network for branch, part in zip(branches, parts, strict=True) for _ in range(len(part))]
        x = torch.cat(parts)
        times = self._times(t, x_t, rows)
        counts = row_counts(len(x), most=self.rows_at_once, multiple=self._multiple(len(x_t)))
        rows_of_all = sum(counts)
        networks += networks[-1:] * (rows_of_all - len(x))
        padded_x, times = padded(x, rows_of_all), padded(times, rows_of_all)
        inputs = self._inputs(conditioning, branches, rows, padded_x)
        outputs = []
        for count, end in zip(counts, accumulate(counts), strict=True):
            piece = slice(end - count, end)
            given = inputs if len(counts) == 1 else input_rows(inputs, piece)
            if self.backbone.records_graphs:
                # Blocks that are compiled one by one are one iteration: the memory of a CUDA graph's output is not
                # used again before the next forward, and `predict` copies what the forward gives.
                torch.compiler.cudagraph_mark_step_begin()
            with self._active(networks[piece], x.device):
                outputs.append(self.backbone.predict(padded_x[piece], times[piece], given))
        return list(torch.cat(outputs)[: len(x)].split([len(part) for part in parts]))

    def _inputs(
        self, conditioning: Conditioning, branches: Sequence[Branch], rows: Sequence[slice | Rows], padded_x: Latents
    ) -> dict[str, Tensor]:
        """The network's inputs of branches for these rows, padded like x.

        Within a run those of branches for all rows are kept until others are asked for: mostly they are the same.
        """
        kinds = "".join(branch.kind for branch in branches)
        key = kinds, len(padded_x), padded_x.device, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kept = {} if self._kept is None or any(branch.rows is not None for branch in branches) else self._kept
        if kept.get("of") is conditioning and kept["key"] == key:
            return kept["inputs"]
        kept.clear()  # before others take memory
        parts = [input_rows(conditioning.of(kind), some) for kind, some in zip(kinds, rows, strict=True)]
        inputs = {name: padded(value, len(padded_x)) for name, value in stack(parts).items()}
        inputs |= self.backbone.guidance_inputs(self.guidance, padded_x)
        kept.update(of=conditioning, key=key, inputs=inputs)
        return inputs

    def _multiple(self, images: int) -> int:
        """Of what the number of rows of a forward is a multiple; rows are repeated until it is.

        A network whose routes are fixed is compiled, and CUDA graphs are recorded for each number of rows. An image
        needs a row for each network, and one under the negative prompt, at some steps fewer. With multiples of the
        number of images, there are at most so many numbers as an image has rows at most, however gates, guidance
        intervals and weights differ between steps and images; and where they do not differ, no row is added.
        """
        if self.batch_invariant:
            return self.rows_at_once or 1
        return images if self.batched is not None and self.batched.fixed else 1

    def _times(self, t: Time, x_t: Latents, rows: Sequence[slice | Rows]) -> Tensor:
        """The network's times of these rows of x_t, one after the other."""
        times = self.path.network_time(t)
        if on_host(times) and times.numel() == 1:  # filled in on the device: a copy would keep a GPU waiting
            times = torch.full((len(x_t),), times.item(), dtype=times.dtype, device=x_t.device)
        times = to_device(times, x_t.device).expand(len(x_t))
        return torch.cat([times[some] for some in rows])

    def _active(self, networks: Sequence[Network], device: torch.device) -> AbstractContextManager[None]:
        """The model as these networks on the rows of its batch."""
        if self.batched is not None:
            return self.batched.routed(self.batched.route_of(networks, device))
        network = networks[0]  # one for all
        if not network.merge:
            return active_adapter(self.network, network.adapter)
        merge = averaged_factors if network.merge == "factors" else merged_adapters
        return merge(self.network, dict(network.weights))
