"""UNets to measure on: a set's base, or an architecture with random weights where none can be loaded."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_base
from stepfuse.fuse.diffusion.noise_path import STABLE_DIFFUSION
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.benchmark.settings import ARCHITECTURES

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A UNet with LoRAs of random weights on it, in a pipeline.

    Attributes:
        name: `sd15`, `sdxl`, or the set whose base it is.
        pipeline: with a text encoder and an autoencoder only where it is a set's base.
        adapters: names of the LoRAs.
        lora: the configuration of each.
    """

    name: str
    pipeline: StableDiffusionPipeline
    adapters: tuple[str, ...]
    lora: LoraConfig


def random_model(
    architecture: str, count: int, *, rank: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Model:
    """An architecture of random weights with LoRAs on its attention.

    Raises:
        ValueError: for an architecture that is not known.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}"
            f"{nearest(architecture, ARCHITECTURES)}"
        )
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**ARCHITECTURES[architecture]).to(dtype).requires_grad_(False).eval()
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    parts = dict(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler)
    pipeline = (
        StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
        if architecture == "sdxl"
        else StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION))
    return Model(name=architecture, pipeline=pipeline, adapters=_add_loras(unet, count, config), lora=config)


def set_model(folder: str, count: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """A set's base, with LoRAs of random weights configured as its first adapter is: as many as are wanted."""
    adapter_set = load_set(folder)
    pipeline = load_base(adapter_set.base, dtype=dtype).to(device)
    first = adapter_set.adapters[0]
    load_adapter(pipeline, first, base_fingerprint(pipeline.unet))
    config = pipeline.unet.peft_config[first.name]
    pipeline.unload_lora_weights()
    return Model(name=str(folder), pipeline=pipeline, adapters=_add_loras(pipeline.unet, count, config), lora=config)


def _add_loras(unet: Any, count: int, config: LoraConfig) -> tuple[str, ...]:
    """LoRAs that are not zero, in the UNet's precision; how long they take does not depend on their values."""
    names = tuple(f"adapter{i + 1}" for i in range(count))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name in names:
            unet.add_adapter(copy.deepcopy(config), adapter_name=name)
    generator = torch.Generator().manual_seed(0)
    for key, value in unet.named_parameters():
        if ".lora_" in key:
            value.requires_grad_(False)
            value.data = value.data.to(unet.dtype)
        if ".lora_A." in key or ".lora_B." in key:
            value.copy_(0.01 * torch.randn(value.shape, generator=generator))
    return names


def random_conditioning(model: Model, images: int) -> Conditioning:
    """Embeddings of prompts nobody wrote, of the model's own shape."""
    unet, generator = model.pipeline.unet, torch.Generator().manual_seed(1)
    tokens = 77 if model.pipeline.tokenizer is None else model.pipeline.tokenizer.model_max_length

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(images, *shape, generator=generator).to(unet.device, unet.dtype)

    added = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        side = float(8 * unet.config.sample_size)
        ids = torch.tensor([side, side, 0, 0, side, side]).to(unet.device, unet.dtype).expand(images, -1)
        added = {"text_embeds": (noise(pooled), noise(pooled)), "time_ids": (ids, ids)}
    width = unet.config.cross_attention_dim
    return Conditioning(positive=noise(tokens, width), negative=noise(tokens, width), added=added)
