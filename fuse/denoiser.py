"""Guided predictions of the base and of its adapters, from one UNet."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from stepfuse.fuse.adapter import GUIDANCE, active_adapter, averaged_factors, merged_adapters
from stepfuse.fuse.path import NoisePath
from stepfuse.fuse.pipeline import Conditioning

Latents = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class MergedAdapters:
    """Adapters merged by weight into one LoRA, Σ w_i B_i A_i, or by factors.

    Attributes:
        weights: (name, w_i) of each.
        factors: average A and B separately.
    """

    weights: tuple[tuple[str, float], ...]
    factors: bool = False


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A UNet with LoRAs on it, and the guidance that makes its prediction a policy.

        prediction = e_u + g (e_c - e_u)          (classifier-free guidance, arXiv:2207.12598)

    Attributes:
        unet: the model; the base is the UNet with its adapters off.
        path: its noise path.
        guidance: where e_u comes from. `shared`: the base; `full`: the adapter itself; `off`: the
            prediction is e_c.
        guidance_scale: g.

    Raises:
        ValueError: for another guidance, or a scale that is not finite.
    """

    unet: nn.Module
    path: NoisePath
    guidance: str = "shared"
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCE:
            raise ValueError(f"guidance {self.guidance!r}; expected one of {', '.join(GUIDANCE)}")
        if not torch.isfinite(torch.tensor(float(self.guidance_scale))):
            raise ValueError(f"guidance_scale {self.guidance_scale}; expected a finite number")

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline, *, guidance: str, guidance_scale: float) -> "Denoiser":
        path = NoisePath.from_scheduler(pipeline.scheduler)
        return cls(unet=pipeline.unet, path=path, guidance=guidance, guidance_scale=guidance_scale)

    def predictions(
        self,
        x_t: Latents,
        t: Tensor | int,
        conditioning: Conditioning,
        adapters: Sequence[str | MergedAdapters | None],
    ) -> list[Latents]:
        """Guided predictions at (x_t, t), one an adapter or merge of several; None is the base.

        With `shared` guidance N adapters cost N + 1 forwards, the unconditional one included.
        """
        if self.guidance == "off":
            return [self.forward(x_t, t, conditioning, "+", name)[0] for name in adapters]
        if self.guidance == "full":
            both = [self.forward(x_t, t, conditioning, "-+", name) for name in adapters]
            return [self.guide(negative, positive) for negative, positive in both]
        shared = self.forward(x_t, t, conditioning, "-+" if None in adapters else "-", None)
        negative, base = shared[0], shared[-1]  # the last is e_c only where None is among the adapters
        positives = [base if name is None else self.forward(x_t, t, conditioning, "+", name)[0] for name in adapters]
        return [self.guide(negative, positive) for positive in positives]

    def guide(self, negative: Latents, positive: Latents) -> Latents:
        """e_u + g (e_c - e_u)."""
        return negative + self.guidance_scale * (positive - negative)

    def forward(
        self,
        x_t: Latents,
        t: Tensor | int,
        conditioning: Conditioning,
        kinds: str,
        adapter: str | MergedAdapters | None,
    ) -> tuple[Latents, ...]:
        """Raw predictions for `+`, `-` or `-+`, in float32 or wider."""
        with self.active(adapter):
            return call_unet(self.unet, self.path, x_t, t, conditioning, kinds)

    def active(self, adapter: str | MergedAdapters | None) -> AbstractContextManager[None]:
        """The UNet as one network."""
        if not isinstance(adapter, MergedAdapters):
            return active_adapter(self.unet, adapter)
        merge = averaged_factors if adapter.factors else merged_adapters
        return merge(self.unet, dict(adapter.weights))


def call_unet(
    unet: nn.Module, path: NoisePath, x_t: Latents, t: Tensor | int, conditioning: Conditioning, kinds: str
) -> tuple[Latents, ...]:
    """One forward over all of `kinds` stacked, taken apart again."""
    times = path.network_time(t).to(x_t.device)
    times = times.expand(len(x_t)) if times.ndim == 0 else times
    dtype = conditioning.positive.dtype
    output = unet(
        torch.cat([x_t] * len(kinds)).to(dtype),
        times.repeat(len(kinds)),
        **conditioning.inputs(kinds),
        return_dict=False,
    )[0]
    return output.to(torch.promote_types(x_t.dtype, torch.float32)).chunk(len(kinds))
