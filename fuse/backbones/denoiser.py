"""Guided predictions of the base and of its adapters, from one UNet."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.conditioning import Conditioning, input_rows, stack_inputs
from stepfuse.fuse.diffusion.noise_path import NoisePath
from stepfuse.fuse.lora.layers import active_adapter, averaged_factors, merged_adapters
from stepfuse.fuse.lora.mixture import Merge

GUIDANCE = ("shared", "full", "off")
Latents = Float[Tensor, "batch channels height width"]
Network = str | Merge | None  # an adapter, several merged, or the base
Rows = Int[Tensor, " rows"]


class Router(Protocol):
    """What runs several networks of a UNet in one forward, each on rows of its own."""

    @property
    def unet(self) -> nn.Module: ...

    def route_of(self, adapters: Sequence[Any], device: torch.device) -> Any:
        """The route of rows with these adapters, those of the base first."""
        ...

    def routed(self, route: Any) -> AbstractContextManager[None]:
        """The UNet on a batch of such rows."""
        ...


@dataclass(frozen=True)
class Branch:
    """Some rows of a batch, with an adapter, under the positive (`+`) or the negative (`-`) prompt.

    Attributes:
        adapter: one, several merged, or None for the base.
        kind: `+` or `-`.
        rows: by default all, in order.
    """

    adapter: Network
    kind: str
    rows: Rows | None = None


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A UNet with LoRAs on it, and the guidance that makes its prediction a policy.

        prediction = e_u + g (e_c - e_u)          (classifier-free guidance, arXiv:2207.12598)

    With g = 1 the prediction is e_c, and e_u is not computed.

    Attributes:
        unet: the model; the base is the UNet with its adapters off.
        path: its noise path.
        guidance: where e_u comes from. `shared`: the base; `full`: the adapter itself; `off`: the
            prediction is e_c.
        guidance_scale: g.
        batched: what runs the adapters in one forward; by default each has a forward of its own.
        rows_at_once: the most rows in one forward: less memory, more forwards. By default no limit.

    Raises:
        ValueError: for another guidance, a scale that is not finite, no rows at once, or adapters of another UNet.
    """

    unet: nn.Module
    path: NoisePath
    guidance: str = "shared"
    guidance_scale: float = 5.0
    batched: Router | None = None
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE:
            raise ValueError(
                f"guidance {self.guidance!r}; expected one of {', '.join(GUIDANCE)}{nearest(self.guidance, GUIDANCE)}"
            )
        if not torch.isfinite(torch.tensor(float(self.guidance_scale))):
            raise ValueError(f"guidance_scale {self.guidance_scale}; expected a finite number")
        if self.rows_at_once is not None and not self.rows_at_once >= 1:
            raise ValueError(f"rows_at_once {self.rows_at_once}; expected 1 or more")
        if self.batched is not None and self.batched.unet is not self.unet:
            raise ValueError("the batched adapters are of another UNet; give BatchedAdapters(unet, names), or None")

    @classmethod
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, *, guidance: str, guidance_scale: float, **options: Any
    ) -> "Denoiser":
        path = NoisePath.from_scheduler(pipeline.scheduler)
        return cls(unet=pipeline.unet, path=path, guidance=guidance, guidance_scale=guidance_scale, **options)

    def unguided(self) -> "Denoiser":
        """The same without guidance: its prediction is e_c."""
        return replace(self, guidance="off")

    def predictions(
        self,
        x_t: Latents,
        t: Tensor | int,
        conditioning: Conditioning,
        adapters: Sequence[Network],
        rows: Sequence[Rows | None] | None = None,
    ) -> list[Latents]:
        """Guided predictions at (x_t, t), one an adapter or merge of several; None is the base.

        With `shared` guidance N adapters cost N + 1 rows an image, the unconditional one included.

        Args:
            rows: which of x_t's rows each adapter is wanted for; by default all.
        """
        chosen = list(rows) if rows is not None else [None] * len(adapters)
        positive = [Branch(adapter, "+", own) for adapter, own in zip(adapters, chosen, strict=True)]
        if self.guidance == "off" or self.guidance_scale == 1:
            return self.run(x_t, t, conditioning, positive)
        if self.guidance == "full":
            negative = [replace(branch, kind="-") for branch in positive]
            outputs = self.run(x_t, t, conditioning, [*negative, *positive])
            return [self.guide(e_u, e_c) for e_u, e_c in zip(*_halves(outputs), strict=True)]
        e_u, *outputs = self.run(x_t, t, conditioning, [Branch(None, "-"), *positive])
        return [
            self.guide(e_u if own is None else e_u[own.to(e_u.device)], e_c)
            for own, e_c in zip(chosen, outputs, strict=True)
        ]

    def guide(self, negative: Latents, positive: Latents) -> Latents:
        """e_u + g (e_c - e_u)."""
        return negative + self.guidance_scale * (positive - negative)

    def forward(
        self,
        x_t: Latents,
        t: Tensor | int,
        conditioning: Conditioning,
        kinds: str,
        adapter: Network,
    ) -> list[Latents]:
        """Raw predictions for `+`, `-` or `-+`, in float32 or wider."""
        return self.run(x_t, t, conditioning, [Branch(adapter, kind) for kind in kinds])

    def run(
        self, x_t: Latents, t: Tensor | int, conditioning: Conditioning, branches: Sequence[Branch]
    ) -> list[Latents]:
        """Raw predictions of branches, in as few forwards as there are networks: one where they are batched."""
        groups: dict[Any, list[int]] = {}
        for place, branch in enumerate(branches):
            groups.setdefault(self._together(branch.adapter), []).append(place)
        if self.batched is not None and None in groups and len(groups) > 1:  # the base goes with any
            base = groups.pop(None)
            groups[next(iter(groups))][:0] = base
        outputs: dict[int, Latents] = {}
        for places in groups.values():
            together = [branches[place] for place in places]
            outputs |= zip(places, self._forward(x_t, t, conditioning, together), strict=True)
        return [outputs[place] for place in range(len(branches))]

    def _together(self, adapter: Network) -> Any:
        """What branches must have in common to be run in one forward."""
        if self.batched is None or adapter is None:
            return adapter
        return ("merged", adapter.factors) if isinstance(adapter, Merge) else "adapters"

    def _forward(
        self, x_t: Latents, t: Tensor | int, conditioning: Conditioning, branches: Sequence[Branch]
    ) -> list[Latents]:
        """Branches of one network, stacked; in several forwards only where `rows_at_once` says so."""
        counts = [len(x_t) if branch.rows is None else len(branch.rows) for branch in branches]
        adapters = [branch.adapter for branch, count in zip(branches, counts, strict=True) for _ in range(count)]
        rows = [None if branch.rows is None else branch.rows.to(x_t.device) for branch in branches]
        x = torch.cat([x_t if own is None else x_t[own] for own in rows])
        times = self.path.network_time(t).to(x_t.device).expand(len(x_t))
        times = torch.cat([times if own is None else times[own] for own in rows])
        parts = [conditioning if own is None else conditioning[own] for own in rows]
        inputs = stack_inputs([part.inputs(branch.kind) for part, branch in zip(parts, branches, strict=True)])
        most = self.rows_at_once or len(x)
        outputs = []
        for some in (slice(first, first + most) for first in range(0, len(x), most)):
            with self._active(adapters[some], x.device):
                outputs.append(call_unet(self.unet, x[some], times[some], input_rows(inputs, some)))
        return list(torch.cat(outputs).split(counts))

    def _active(self, adapters: Sequence[Network], device: torch.device) -> AbstractContextManager[None]:
        """The UNet with these adapters on the rows of its batch."""
        if self.batched is not None:
            return self.batched.routed(self.batched.route_of(adapters, device))
        adapter = adapters[0]  # one network for all
        if not isinstance(adapter, Merge):
            return active_adapter(self.unet, adapter)
        merge = averaged_factors if adapter.factors else merged_adapters
        return merge(self.unet, dict(adapter.weights))


def call_unet(unet: nn.Module, x: Latents, times: Tensor, inputs: Mapping[str, Any]) -> Latents:
    """One forward, in float32 or wider."""
    output = unet(x.to(inputs["encoder_hidden_states"].dtype), times, return_dict=False, **inputs)[0]
    return output.to(torch.promote_types(x.dtype, torch.float32), copy=True)  # the next forward may reuse its memory


def _halves(values: Sequence[Latents]) -> tuple[Sequence[Latents], Sequence[Latents]]:
    return values[: len(values) // 2], values[len(values) // 2 :]
