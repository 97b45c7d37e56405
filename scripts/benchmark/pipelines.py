"""Whole pipelines of random weights in a published shape, and UNets that share their frozen weights."""

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.scripts.benchmark.models import random_model

# What stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 have beside the libraries' defaults. Of both:
AUTOENCODER: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
TEXT_ENCODER: dict[str, Any] = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
# Each one's own:
OWN_AUTOENCODER: dict[str, dict[str, Any]] = {
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


def random_pipeline(architecture: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionPipeline:
    """A pipeline of random weights; words are the embedded base's, whose tokens are fewer than the published ones.

    Raises:
        ValueError: for an architecture that is not known.
    """
    base = random_model(architecture, 0, dtype=dtype, device=device).pipeline
    tokenizer = CLIPTokenizer.from_pretrained(emoji.PIPELINE / "tokenizer", model_max_length=77)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "vae": AutoencoderKL(**AUTOENCODER, **OWN_AUTOENCODER[architecture]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, **ids)),
        }
        if architecture == "sdxl":
            config = CLIPTextConfig(**SECOND_TEXT_ENCODER, **ids)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    parts = {name: part.to(dtype).requires_grad_(False).eval() for name, part in parts.items()}
    parts |= {"tokenizer": tokenizer, "unet": base.unet, "scheduler": base.scheduler}
    if architecture == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def with_own_unet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same parts, and a UNet that can have a LoRA of its own: other modules, the same frozen weights."""
    unet = pipeline.unet
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    own = copy.copy(pipeline)
    own.unet = copy.deepcopy(unet, shared)
    return own
