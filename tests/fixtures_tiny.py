"""Randomly initialised pipelines of a few thousand weights, and adapters for them, saved as real ones are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepfuse.data import emoji
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.fingerprint import base_fingerprint
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.diffusion.variance import EtaSchedule, VarianceSchedule
from stepfuse.fuse.lora.factors import network_factors, peft_state
from stepfuse.fuse.lora.file import open_lora
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.adapter import write_adapter
from stepfuse.fuse.sets.entries import Adapter
from stepfuse.train.lora import add_lora

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
LATENT = (4, 8, 8)  # of 16×16 pixels: one level of the autoencoder halves them
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def ddim(**config: object) -> DDIMScheduler:
    return DDIMScheduler(**BETAS | dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1) | config)


def denoiser_of(
    unet: UNet2DConditionModel, scheduler: SchedulerMixin, *, guidance: str, guidance_scale: float = 5.0, **options: Any
) -> Denoiser:
    """A denoiser of a UNet without text encoders and autoencoder."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    backbone = backbone_of(
        StableDiffusionPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    )
    chosen = Guidance(source=guidance, scale=guidance_scale)
    return Denoiser(backbone=backbone, path=backbone.path(), guidance=chosen, **options)


def prompt_embeds(positive: torch.Tensor, negative: torch.Tensor) -> Conditioning:
    """Embeddings of prompts and negative prompts, as Stable Diffusion takes them."""
    return Conditioning(positive={"prompt_embeds": positive}, negative={"prompt_embeds": negative})


def save_stable_diffusion(
    folder: Path,
    *,
    scheduler: SchedulerMixin | None = None,
    seed: int = 0,
    channels: tuple[int, ...] = (16, 32),
    unet: Mapping[str, object] | None = None,
    vae: Mapping[str, object] | None = None,
    variant: str | None = None,
) -> Path:
    """A Stable Diffusion pipeline of random weights that draws 16×16 pixels.

    Args:
        unet: other values of the UNet's configuration.
        vae: values of the configuration of an AutoencoderKL, in place of the tiny one.
        variant: of its weight files.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(vae),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=_tokenizer(),
            unet=_unet(**dict(block_out_channels=channels, cross_attention_dim=32) | dict(unet or {})),
            scheduler=scheduler or ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, variant=variant)
    return folder


def save_stable_diffusion_xl(
    folder: Path,
    *,
    scheduler: SchedulerMixin | None = None,
    seed: int = 0,
    unet: Mapping[str, object] | None = None,
    vae: Mapping[str, object] | None = None,
    **index: object,
) -> Path:
    """The same as Stable Diffusion XL: two text encoders, and their pooled text and the sizes beside the time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(vae),
            text_encoder=CLIPTextModel(text_config()),
            text_encoder_2=CLIPTextModelWithProjection(text_config()),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=_unet(
                **dict(
                    block_out_channels=(16, 32),
                    cross_attention_dim=2 * 32,
                    use_linear_projection=True,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=6 * 8 + 24,  # six size ids of width 8, the pooled text of 24
                )
                | dict(unet or {})
            ),
            scheduler=scheduler or ddim(),
            **index,
        )
    pipeline.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path,
    base: Path,
    name: str,
    *,
    rank: int = 2,
    alpha: int | None = None,
    seed: int = 0,
    targets: Sequence[str] = ATTENTION,
    variance: VarianceSchedule | None = None,
    beta: float = 0.1,
    reward: str | None = None,
    guidance: str = "shared",
    guidance_scale: float = 3.0,
    num_inference_steps: int = 3,
) -> Adapter:
    """An adapter of random weights, as training would leave it."""
    pipeline = load_pipeline(str(base))
    fingerprint = base_fingerprint(pipeline.unet)
    add_random_lora(pipeline, name, rank=rank, alpha=alpha, seed=seed, targets=targets)
    return write_adapter(
        Adapter(
            folder=folder,
            objective=Objective(
                name=name, reward=reward or f"reward_of_{name}", variance=variance or EtaSchedule(), beta=beta
            ),
            base={"name_or_path": str(base)} | fingerprint,
            guidance=guidance,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
        ),
        network_factors(pipeline.unet, name),
        "unet",
    )


def add_random_lora(
    pipeline: DiffusionPipeline,
    name: str,
    *,
    rank: int,
    alpha: int | None,
    seed: int,
    targets: Sequence[str] = ATTENTION,
) -> None:
    """A LoRA whose B is not zero, so that it changes what the UNet says."""
    add_lora(pipeline.unet, name, rank=rank, alpha=alpha, targets=list(targets), seed=seed + 100)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in pipeline.unet.named_parameters():
            if f"lora_B.{name}." in key:
                value.normal_(std=0.1, generator=generator)


def read_lora(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file under peft's names."""
    with open_lora(file, ["unet", "transformer"]) as lora:
        return {f"{lora.part}.{key}": value for key, value in peft_state(lora.factors()).items()}


def networks(*adapters: str | None) -> list[Network]:
    """The networks of adapters, and of the base for None."""
    return [Network.of(adapter) for adapter in adapters]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@contextmanager
def refused(*culprits: str) -> Iterator[None]:
    """A ValueError of one line that names what is wrong."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        yield
    for culprit in culprits:
        assert culprit in str(error.value)


def _unet(**config: object) -> UNet2DConditionModel:
    common = dict(
        sample_size=LATENT[1],
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=2,
    )
    return UNet2DConditionModel(**common | config)


def _autoencoder(config: Mapping[str, object] | None) -> AutoencoderTiny | AutoencoderKL:
    if config is not None:
        common = dict(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        return AutoencoderKL(**common | dict(config))
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=1401,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(emoji.PIPELINE / "tokenizer")
