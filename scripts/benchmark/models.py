"""Models to measure on: a set's base, or an architecture of random weights where none can be loaded."""

import copy
import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.loading import load_base
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.schedulers import STABLE_DIFFUSION
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.benchmark.settings import ARCHITECTURES

# What stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 have beside the libraries' defaults: both, and each.
AUTOENCODER: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
TEXT_ENCODER: dict[str, Any] = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "sd15": dict(sample_size=512, scaling_factor=0.18215),
    "sdxl": dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
}
SECOND_TEXT_ENCODER: dict[str, Any] = dict(
    vocab_size=49408,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def random_model(
    architecture: str, count: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> StableDiffusionPipeline:
    """A UNet of random weights, with LoRAs of rank 4 on its attention, in a pipeline that has no other network."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**ARCHITECTURES[architecture]).to(dtype).requires_grad_(False).eval()
    _add_loras(unet, count, LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION)))
    parts = dict(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(**STABLE_DIFFUSION))
    if architecture == "sdxl":
        return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    unchecked = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**parts, **unchecked)


def random_pipeline(architecture: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionPipeline:
    """A pipeline of random weights, with the tokenizer of the embedded base, which has fewer tokens than published."""
    pipeline = random_model(architecture, 0, dtype=dtype, device=device)
    tokenizer = CLIPTokenizer.from_pretrained(emoji.PIPELINE / "tokenizer", model_max_length=77)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "vae": AutoencoderKL(**AUTOENCODER, **AUTOENCODERS[architecture]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, **ids)),
        }
        if architecture == "sdxl":
            config = CLIPTextConfig(**SECOND_TEXT_ENCODER, **ids)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    pipeline.register_modules(**{name: part.to(dtype).requires_grad_(False).eval() for name, part in parts.items()})
    pipeline.register_modules(tokenizer=tokenizer, **({"tokenizer_2": tokenizer} if architecture == "sdxl" else {}))
    return pipeline


def set_model(
    folder: str, count: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> StableDiffusionPipeline:
    """A set's base, with LoRAs of random weights configured as its first adapter is: as many as are wanted."""
    adapter_set = load_set(folder, read_weights=False)
    pipeline = load_base(adapter_set.base, dtype=dtype).to(device)
    first = adapter_set.adapters[0]
    load_adapter(backbone_of(pipeline), first, base_fingerprint(pipeline.unet))
    config = pipeline.unet.peft_config[first.name]
    pipeline.unload_lora_weights()
    _add_loras(pipeline.unet, count, config)
    return pipeline


def _add_loras(unet: Any, count: int, config: LoraConfig) -> None:
    """Add LoRAs that are not zero, in the UNet's precision; their time does not depend on their values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for i in range(count):
            unet.add_adapter(copy.deepcopy(config), adapter_name=f"adapter{i + 1}")
    generator = torch.Generator().manual_seed(0)
    for key, value in unet.named_parameters():
        if ".lora_" in key:
            value.requires_grad_(False)
            value.data = value.data.to(unet.dtype)
        if ".lora_A." in key or ".lora_B." in key:
            value.copy_(0.01 * torch.randn(value.shape, generator=generator))


def random_conditioning(pipeline: StableDiffusionPipeline, images: int) -> Conditioning:
    unet, config, generator = pipeline.unet, pipeline.unet.config, torch.Generator().manual_seed(1)
    tokens = 77 if pipeline.tokenizer is None else pipeline.tokenizer.model_max_length

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(images, *shape, generator=generator).to(unet.device, unet.dtype)

    def embeddings() -> dict[str, torch.Tensor]:
        prompts = {"prompt_embeds": noise(tokens, config.cross_attention_dim)}
        if config.addition_embed_type != "text_time":
            return prompts
        side = float(8 * config.sample_size)
        sizes = torch.tensor([side, side, 0, 0, side, side]).to(unet.device, unet.dtype).expand(images, -1)
        features = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return prompts | {"text_embeds": noise(features), "time_ids": sizes}

    return Conditioning(positive=embeddings(), negative=embeddings())


def with_copied_unet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same parts, with a copy of the UNet that can have another LoRA: other modules, the same frozen weights."""
    unet = pipeline.unet
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    copied = copy.copy(pipeline)
    copied.unet = copy.deepcopy(unet, shared)
    return copied
