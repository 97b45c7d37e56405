"""The ways to sample that a benchmark's table has, each ready to run on one model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.loading import quiet_libraries
from stepfuse.fuse.backbones.unet import latent_shape
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.scripts.benchmark.models import random_conditioning, random_model, set_model
from stepfuse.scripts.benchmark.rivals import RIVALS, denoise
from stepfuse.scripts.benchmark.settings import ARCHITECTURES, BASELINES, SEPARATE, SamplingBenchmark

REFERENCE = "one adapter"


@dataclass(frozen=True)
class Row:
    """A row of the table: a way to sample, with so many adapters."""

    way: str
    adapters: int

    def __str__(self) -> str:
        return self.way if self.way == REFERENCE else f"{self.way}, {self.adapters} adapters"


def rows_of(settings: SamplingBenchmark) -> list[Row]:
    """The reference, then rules and rivals at each number of adapters."""
    rows = [Row(REFERENCE, 1)]
    for way in (*settings.rules, *settings.rivals):
        # A rule with one adapter is the reference; a rival has its own way with one.
        rows += [Row(way, n) for n in settings.adapters if n > 1 or way in BASELINES]
    return rows


@dataclass(frozen=True)
class Way:
    """A way, ready to run.

    Attributes:
        run: from x_T to x_0.
        networks: the UNets it runs.
    """

    run: Callable[[], torch.Tensor]
    networks: tuple[nn.Module, ...]


class Bench:
    """A model and what every way starts from: the same x_T and the same prompts."""

    def __init__(self, settings: SamplingBenchmark) -> None:
        quiet_libraries()
        self.settings = settings
        most = max(settings.adapters)
        build = random_model if settings.model in ARCHITECTURES else set_model
        self.model = build(settings.model, most, dtype=getattr(torch, settings.dtype), device=settings.device)
        pipeline = self.model.pipeline
        self.conditioning = random_conditioning(self.model, settings.images)
        shape = latent_shape(pipeline, settings.height, settings.width)
        x_T = torch.randn(settings.images, *shape, generator=torch.Generator().manual_seed(0))
        self.x_T = x_T.to(settings.device)
        # Adapters are put into one batch, and compiled, in place: what runs beside that has a UNet of its own.
        self.plain = copy.deepcopy(pipeline.unet) if settings.compile else pipeline.unet
        self._copies: dict[tuple[str, ...], nn.Module] = {}
        etas = torch.linspace(0.8, 1.0, most).tolist()
        self.sampler = FusedSampler(
            pipeline=pipeline,
            objectives=tuple(
                Objective(name=name, reward=name, variance=EtaSchedule(eta=eta), beta=1.0)
                for name, eta in zip(self.model.adapters, etas, strict=True)
            ),
            denoiser=Denoiser.from_pipeline(pipeline, guidance="shared", guidance_scale=settings.guidance_scale),
            reference=EtaSchedule(eta=1.0),
            rule=get_rule("product"),
            num_inference_steps=settings.steps,
            default_weights={self.model.adapters[0]: 1.0},
        )

    def batch(self) -> None:
        """Put the adapters into one batch; copies are made before."""
        batched = BatchedAdapters(self.model.pipeline.unet, self.model.adapters)
        denoiser = replace(self.sampler.denoiser, batched=batched, rows_at_once=self.settings.rows_at_once)
        self.sampler = replace(self.sampler, denoiser=denoiser)
        if self.settings.compile:
            options = {"mode": self.settings.mode} if self.settings.mode else {}
            rows = self.settings.images * (max(self.settings.adapters) + 1)
            self.sampler.compile(self.settings.compile, rows=rows, **options)

    def copy_of(self, names: Sequence[str]) -> nn.Module:
        """A whole UNet of its own with some of the adapters alone; the same one for the same names."""
        if tuple(names) not in self._copies:
            unet = copy.deepcopy(self.plain)
            unet.set_adapter(list(names))  # first, for peft warns of an active adapter that goes
            unet.delete_adapters([name for name in self.model.adapters if name not in names])
            self._copies[tuple(names)] = unet
        return self._copies[tuple(names)]

    def way(self, row: Row) -> Way:
        """A row's way; it holds only what it needs."""
        names, steps, scale = self.model.adapters[: row.adapters], self.settings.steps, self.settings.guidance_scale
        x_T, conditioning = self.x_T, self.conditioning
        if row.way in RIVALS:
            blend, networks = RIVALS[row.way](self.plain, self.copy_of, names, scale)
            scheduler = self.sampler.denoiser.path.scheduler
            return Way(lambda: denoise(blend, scheduler, steps, x_T, conditioning), tuple(networks))
        sampler = self.sampler.with_rule("product" if row.way in (REFERENCE, SEPARATE) else row.way)
        if row.way == SEPARATE:
            sampler = replace(sampler, denoiser=replace(sampler.denoiser, unet=self.plain, batched=None))

        def ours() -> torch.Tensor:
            plan = sampler.plan(dict.fromkeys(names, 1.0), len(x_T))
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(x_T))]
            return sampler.denoise(x_T, plan, conditioning, generators)

        return Way(ours, (sampler.denoiser.unet,))
