"""Pipelines of a few thousand random weights, one a model family, saved as real ones are."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.fuse.backbones.flow import LENGTH
from tests import fixtures_families_flux as flux
from tests.fixtures_families_qwen import qwen_image, z_image
from tests.fixtures_families_sana import lumina2, sana
from tests.fixtures_tiny import text_config


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family for tests.

    Attributes:
        make: the pipeline of random weights.
        size: of its images in pixels.
        guidance: a source of guidance with which diffusers' pipeline is compared.
        call: arguments of diffusers' pipeline for guidance by `guidance` with scale g.
        unpack: latents of diffusers' pipeline → (batch, channels, height, width).
        wide: layers beside attention that a LoRA is put on: embedders and modulations, whose inputs have other shapes.
        training: settings of its own, where those of all make no clear difference.
        refused: layers whose LoRAs are refused by batched forwards.
    """

    make: Callable[[], DiffusionPipeline]
    size: int
    guidance: str
    call: Callable[[float], Mapping[str, Any]]
    wide: tuple[str, ...]
    unpack: Callable[[DiffusionPipeline, torch.Tensor, int], torch.Tensor] = field(default=lambda p, z, size: z)
    training: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def save_family(name: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = FAMILIES[name].make()
    for parameter in pipeline.transformer.parameters():  # some are initialised with zeros, and say nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    pipeline.save_pretrained(folder)
    if length := pipeline.config.get(LENGTH):
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"max_sequence_length": length}))
    return folder


def autoencoder(channels: int, **config: Any) -> AutoencoderKL:
    """Of one level, which halves the image."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        **dict(scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False) | config,
    )


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(emoji.CLIP)


def clip_text_encoder() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(**text_config().to_dict() | {"num_hidden_layers": 2}))


def sd3() -> StableDiffusion3Pipeline:
    """Without T5; the second block is context_pre_only, the first has dual attention, as in SD 3.5."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=80,
        caption_projection_dim=16,
        pooled_projection_dim=48,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


FAMILIES: dict[str, Family] = {
    "sd3": Family(
        make=sd3,
        size=16,
        guidance="shared",
        call=lambda g: {"guidance_scale": g, "max_sequence_length": 256},
        wide=("context_embedder", "pos_embed.proj", "norm1.linear", "ff.net.0.proj", "attn2.to_q", "proj_out"),
    ),
    "qwen_image": Family(
        make=qwen_image,
        size=16,
        guidance="shared",
        call=lambda g: {"true_cfg_scale": g, "negative_prompt": ["", ""]},
        unpack=lambda p, z, size: p._unpack_latents(z, size, size, p.vae_scale_factor)[:, :, 0],
        wide=("img_in", "txt_in", "img_mod.1", "timestep_embedder.linear_1", "txt_mlp.net.2", "norm_out.linear"),
    ),
    "z_image": Family(
        make=lambda: z_image(autoencoder(4)),
        size=16,
        guidance="shared",
        call=lambda g: {"guidance_scale": g - 1},
        wide=("2-1.adaLN_modulation.1", "feed_forward.w2", "2-1.linear"),
        refused=("all_x_embedder.2-1", "cap_embedder.1"),
    ),
    "sana": Family(
        make=sana,
        size=32,
        guidance="shared",
        call=lambda g: {"guidance_scale": g, "use_resolution_binning": False},
        wide=("patch_embed.proj", "time_embed.linear", "caption_projection.linear_1", "conv_inverted", "conv_point"),
    ),
    "lumina2": Family(
        make=lumina2,
        size=32,
        guidance="shared",
        call=lambda g: {"guidance_scale": g},
        wide=(
            "x_embedder",
            "caption_embedder.1",
            "timestep_embedder.linear_1",
            "feed_forward.linear_1",
            "norm1.linear",
        ),
    ),
    "flux": Family(make=flux.flux_dev, guidance="embedded", **flux.FLUX),
    "flux2": Family(make=flux.flux2_klein, guidance="shared", training={"sample_num_steps": 8}, **flux.FLUX2),
}
