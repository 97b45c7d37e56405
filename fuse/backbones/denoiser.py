"""Guided predictions of the base and of its adapters, from one network."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning, input_rows, stack
from stepfuse.fuse.backbones.guidance import Branch, Guidance, Latents, SomeRows
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

    def fix(self, rows: int, device: torch.device) -> None:
        """Keep routes of up to so many rows in tensors that stay where they are, as compiled networks want them."""
        return

    def release(self) -> None:
        """Give back the memory of merged weights, where there are any."""
        return


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

    Raises:
        ValueError: for no rows at once, or adapters of another network.
    """

    backbone: Backbone
    path: NoisePath
    guidance: Guidance = field(default_factory=Guidance)
    batched: Router | None = None
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.rows_at_once is not None and not self.rows_at_once >= 1:
            raise ValueError(f"rows_at_once {self.rows_at_once}; expected 1 or more")
        self.backbone.check_guidance(self.guidance)
        if self.batched is not None and self.batched.network is not self.network:
            raise ValueError(
                "the batched adapters are of another network; give BatchedAdapters(network, names), or None"
            )

    @property
    def network(self) -> Any:
        return self.backbone.network

    def predictions(
        self, x_t: Latents, t: Time, conditioning: Conditioning, networks: Sequence[Network], rows: SomeRows = None
    ) -> list[Latents]:
        """Guided predictions at (x_t, t), one a network, each for these rows of x_t."""
        branches = self.guidance.branches(networks, rows)
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
        branches = self.guidance.branches(networks, rows)
        known = [] if negative is None else [negative]
        outputs = [*known, *self.run(x_t, t, conditioning, branches[len(known) :])]
        shared = outputs[0] if self.guidance.shares else None
        return Guided(predictions=self.combine(branches, outputs), negative=shared)

    def combine(self, branches: Sequence[Branch], outputs: Sequence[Latents]) -> list[Latents]:
        """Guided predictions of the raw ones of `guidance.branches`."""
        return self.guidance.combine(branches, outputs, self.backbone.guide)

    def run(self, x_t: Latents, t: Time, conditioning: Conditioning, branches: Sequence[Branch]) -> list[Latents]:
        """Raw predictions of branches, in float32 or wider: a forward for each network, or one if they are batched."""
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

    def _forward(self, x_t: Latents, t: Time, conditioning: Conditioning, branches: Sequence[Branch]) -> list[Latents]:
        """Branches of one network, stacked; in several forwards only where `rows_at_once` says so."""
        rows: list[slice | Rows] = [
            slice(None) if branch.rows is None else branch.rows.to(x_t.device) for branch in branches
        ]
        parts = [x_t[some] for some in rows]
        networks = [branch.network for branch, part in zip(branches, parts, strict=True) for _ in range(len(part))]
        x = torch.cat(parts)
        times = self.path.network_time(t).to(x_t.device).expand(len(x_t))
        times = torch.cat([times[some] for some in rows])
        inputs = stack([conditioning[some].inputs(branch.kind) for some, branch in zip(rows, branches, strict=True)])
        inputs |= self.backbone.guidance_inputs(self.guidance, x)
        most = self.rows_at_once or len(x)
        outputs = []
        for piece in (slice(first, first + most) for first in range(0, len(x), most)):
            with self._active(networks[piece], x.device):
                outputs.append(self.backbone.predict(x[piece], times[piece], input_rows(inputs, piece)))
        return list(torch.cat(outputs).split([len(part) for part in parts]))

    def _active(self, networks: Sequence[Network], device: torch.device) -> AbstractContextManager[None]:
        """The model as these networks on the rows of its batch."""
        if self.batched is not None:
            return self.batched.routed(self.batched.route_of(networks, device))
        network = networks[0]  # one for all
        if not network.merge:
            return active_adapter(self.network, network.adapter)
        merge = averaged_factors if network.merge == "factors" else merged_adapters
        return merge(self.network, dict(network.weights))
