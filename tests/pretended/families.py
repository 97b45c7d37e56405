"""A set of two adapters on a tiny base of every model family, and how it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepfuse.fuse.backbones.fingerprint import describe_base
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.create import create_set
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.lora import add_lora
from tests.fixtures_families import FAMILIES as FLOWS
from tests.fixtures_families import save_family
from tests.fixtures_tiny import save_stable_diffusion, save_stable_diffusion_xl

PROMPTS = ["a red apple", "a cat on a blue background"]
UNETS = {"stable_diffusion": save_stable_diffusion, "stable_diffusion_xl": save_stable_diffusion_xl}
FAMILIES: Sequence[str] = (*UNETS, *FLOWS)


@dataclass(frozen=True, kw_only=True)
class FamilySet:
    """A set, with the name of the pipeline's class of its base, and its size of images in pixels."""

    pipeline: str
    size: int
    folder: Path


def save_family_set(name: str, root: Path) -> FamilySet:
    """Save the set of one of `FAMILIES` and its base."""
    base = UNETS[name](root / "base") if name in UNETS else save_family(name, root / "base")
    size, guidance = (16, "shared") if name in UNETS else (FLOWS[name].size, FLOWS[name].guidance)
    for seed, adapter in enumerate(("a", "b")):
        pipeline = load_pipeline(str(base))
        backbone = backbone_of(pipeline)
        described = describe_base(backbone, str(base))
        add_lora(backbone.network, adapter, rank=2, alpha=4, targets=list(backbone.targets), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for key, value in backbone.network.named_parameters():
            if f"lora_B.{adapter}." in key:
                value.data.normal_(std=0.2, generator=generator)
        written = Adapter(
            folder=root / adapter,
            objective=Objective(name=adapter, reward=adapter, variance=EtaSchedule(eta=0.5 + seed / 2), beta=0.1),
            base=described,
            guidance=guidance,
            guidance_scale=3.0,
            num_inference_steps=2,
        )
        write_adapter(written, network_factors(backbone.network, adapter), backbone.part)
    create_set(root / "set", [root / "a", root / "b"], base_schedule=EtaSchedule(eta=0.7))
    return FamilySet(pipeline=type(pipeline).__name__, size=size, folder=root / "set")


def draw_family(sampler: FusedSampler, family: FamilySet, steps: int, output_type: str = "latent") -> Tensor:
    """Two images of the product."""
    return sampler.sample(
        PROMPTS,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        height=family.size,
        width=family.size,
        output_type=output_type,
        progress=False,
    )
