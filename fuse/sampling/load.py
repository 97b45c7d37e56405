"""Loading the base of a set, with all of its adapters on it."""

import torch
from diffusers import DiffusionPipeline

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import base_fingerprint, check_path, same_base
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import INPUTS, load_base, register_inputs
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet


def load_backbone(
    adapter_set: AdapterSet, pipeline: DiffusionPipeline | None, dtype: torch.dtype, device: str | torch.device
) -> Backbone:
    """A set's base, or this pipeline of it, with a LoRA for each adapter on its network.

    A pipeline that is given takes over the number of tokens and the resolution that the set records.

    Raises:
        ValueError: for a pipeline that is not the set's base, or that is offloaded already, and for a faulty adapter.
    """
    backbone = backbone_of(pipeline or load_base(adapter_set.base, dtype=dtype))
    backbone.check()
    if any(parameter.is_meta for parameter in backbone.network.parameters()):
        raise ValueError("the pipeline is offloaded already; make the sampler first, then offload its pipeline")
    backbone.pipeline.to(device)
    fingerprint = base_fingerprint(backbone.network)
    if not same_base(adapter_set.base, fingerprint):
        raise ValueError(f"the pipeline is not the set's base, {adapter_set.base['name_or_path']!r}")
    if pipeline is not None:
        register_inputs(pipeline, **{name: adapter_set.base[name] for name in INPUTS if name in adapter_set.base})
    check_path(adapter_set.base, backbone.path(backbone.default_shape))
    for adapter in adapter_set.all_adapters:
        load_adapter(backbone, adapter, fingerprint)
    return backbone


def make_denoiser(
    adapter_set: AdapterSet,
    backbone: Backbone,
    guidance: Guidance,
    *,
    batched: bool,
    rows_at_once: int | None,
    batch_invariant: bool,
) -> Denoiser:
    """The guided predictions of a set's base with its adapters on it.

    Args:
        batched: all adapters in one forward.
        rows_at_once, batch_invariant: see `Denoiser`; by default an invariant forward has as many rows as one image at
            most: of the base, of every adapter, and of the negative prompt.

    Raises:
        ValueError: for adapters that have no batched form.
    """
    names = [adapter.name for adapter in adapter_set.all_adapters]
    router = BatchedAdapters(backbone.network, names, backbone.unbatched) if batched else None
    if batch_invariant:
        rows_at_once = rows_at_once or len(guidance.branches([BASE] * (1 + len(adapter_set.objectives))))
        if router is not None:  # the LoRAs of every row are computed then, of the base's rows too
            router.fix(rows_at_once, backbone.device)
    return Denoiser(
        backbone=backbone,
        path=backbone.path(backbone.default_shape),
        guidance=guidance,
        batched=router,
        rows_at_once=rows_at_once,
        batch_invariant=batch_invariant,
    )
