"""Loading the base of a set, with all of its adapters on it."""

import torch
from diffusers import DiffusionPipeline

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import base_fingerprint, check_path, same_base
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_base
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.lora.batched import BatchedAdapters
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet

FORWARDS = ("batched", "separate")


def load_denoiser(
    adapter_set: AdapterSet,
    pipeline: DiffusionPipeline | None,
    *,
    guidance: Guidance,
    forwards: str,
    rows_at_once: int | None,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Denoiser:
    """The guided predictions of a set's base, with a LoRA for each adapter; for the arguments see `FusedSampler`.

    Raises:
        ValueError: for an unknown word for forwards, a pipeline that is not the set's base, or that is offloaded
            already, and for a faulty adapter.
    """
    if forwards not in FORWARDS:
        raise ValueError(f"forwards {forwards!r}; expected {' or '.join(FORWARDS)}")
    if pipeline is None:
        backbone = backbone_of(load_base(adapter_set.base, dtype=dtype))
    else:
        backbone = backbone_of(pipeline)
        backbone.check()
    network = backbone.network
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("the pipeline is offloaded already; make the sampler first, then offload its pipeline")
    backbone.pipeline.to(device)
    fingerprint, path = base_fingerprint(network), backbone.path(backbone.default_shape)
    if not same_base(adapter_set.base, fingerprint):
        raise ValueError(f"the pipeline is not the set's base, {adapter_set.base['name_or_path']!r}")
    check_path(adapter_set.base, path)
    names = []
    for adapter in adapter_set.all_adapters:
        load_adapter(backbone, adapter, fingerprint)
        names.append(adapter.name)
    batched = BatchedAdapters(network, names, backbone.unbatched) if forwards == "batched" else None
    return Denoiser(backbone=backbone, path=path, guidance=guidance, batched=batched, rows_at_once=rows_at_once)
