"""Base models as diffusers pipelines: loading them, prompts to embeddings, latents to pixels and back."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.library_messages import (
    TRUNCATION,
    StableDiffusionXLPipeline,
    retrieve_latents,
    without_messages,
)
from stepfuse.fuse.backbones.checks import check_has_texts
from stepfuse.fuse.backbones.conditioning import Conditioning


def execution_device(pipeline: DiffusionPipeline) -> torch.device:
    """Where the pipeline computes; with offloading its modules lie elsewhere meanwhile."""
    return pipeline._execution_device


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str] | None,
    negative_prompts: Sequence[str | None] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    device: torch.device | None = None,
    prompt_embeds: Float[Tensor, "batch tokens width"] | None = None,
    negative_prompt_embeds: Float[Tensor, "batch tokens width"] | None = None,
    pooled_prompt_embeds: Float[Tensor, "batch pooled"] | None = None,
    negative_pooled_prompt_embeds: Float[Tensor, "batch pooled"] | None = None,
) -> Conditioning:
    """Embed prompts as the pipeline itself does; height and width matter to SDXL only.

    Args:
        prompts: None where embeddings are given.
        negative_prompts: one a prompt. None stands for no negative prompt, which is not the same as "": where SDXL's
            `force_zeros_for_empty_prompt` is set, its embedding is zero; elsewhere it is that of "".
        device: of the text encoders; by default that on which the pipeline computes.
        prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds: embeddings to take
            instead, the pooled ones of SDXL only; as in diffusers' pipelines.

    Raises:
        ValueError: for prompts without a text encoder.
    """
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    if prompt_embeds is None or (negative_prompt_embeds is None and not _zeros_without(pipeline, negative_prompts)):
        check_has_texts(pipeline)
    count = len(prompts) if prompts is not None else len(cast(Tensor, prompt_embeds))
    negatives = [None] * count if negative_prompts is None else list(negative_prompts)
    absent = torch.tensor([negative is None for negative in negatives])
    arguments: dict[str, Any] = dict(
        prompt=None if prompts is None else list(prompts),
        device=device or execution_device(pipeline),
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None if bool(absent.all()) else [negative or "" for negative in negatives],
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
    )
    with without_messages(*TRUNCATION):  # `prompt_length` reports it
        if not xl:
            positive, negative = pipeline.encode_prompt(**arguments)
            return Conditioning(positive=positive, negative=negative)
        positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
            **arguments,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )
    pooled, negative_pooled = pooled.to(positive), negative_pooled.to(positive)
    if negative_prompt_embeds is None and pipeline.config.force_zeros_for_empty_prompt:
        zeros = absent.to(positive.device)  # of a list that has some, the others were embedded
        negative = torch.where(zeros[:, None, None], 0, negative)
        negative_pooled = torch.where(zeros[:, None], 0, negative_pooled)
    height, width = image_size(pipeline, height, width)
    encoder = pipeline.text_encoder_2
    ids = pipeline._get_add_time_ids(
        (height, width),
        (0, 0),
        (height, width),
        dtype=positive.dtype,
        text_encoder_projection_dim=pooled.shape[-1] if encoder is None else encoder.config.projection_dim,
    ).to(positive.device)
    ids = ids.expand(count, -1)
    return Conditioning(
        positive=positive,
        negative=negative,
        added={"text_embeds": (pooled, negative_pooled), "time_ids": (ids, ids)},
    )


def _zeros_without(pipeline: DiffusionPipeline, negative_prompts: Sequence[str | None] | None) -> bool:
    """Whether the negative embedding is zero, so that no text is embedded for it."""
    none = negative_prompts is None or all(negative is None for negative in negative_prompts)
    return none and bool(pipeline.config.get("force_zeros_for_empty_prompt"))


def image_size(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default those the UNet was trained at.

    Raises:
        ValueError: for a size the pipeline cannot draw, or none where the UNet does not state one.
    """
    factor = pipeline.vae_scale_factor
    native = pipeline.unet.config.sample_size
    if native is None:
        if height is None or width is None:
            raise ValueError("the base's UNet has sample_size None; give height and width, or resolution in training")
        native = (0, 0)
    native_height, native_width = native if isinstance(native, list | tuple) else (native, native)
    size = (
        native_height * factor if height is None else height,
        native_width * factor if width is None else width,
    )
    step = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels <= 0 or pixels % step:
            raise ValueError(f"{name} is {pixels}; expected a positive multiple of {step} for this model")
    return size


def latent_shape(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Channels, height and width of one latent."""
    pixels = image_size(pipeline, height, width)
    factor = pipeline.vae_scale_factor
    return (pipeline.unet.config.in_channels, pixels[0] // factor, pixels[1] // factor)


def decode_latents(
    pipeline: DiffusionPipeline, latents: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, "batch 3 height width"]:
    """Latents → float32 pixels in [0, 1], differentiable."""
    return VaeImageProcessor.denormalize(decode_unclamped(pipeline, latents))


def decode_unclamped(
    pipeline: DiffusionPipeline, latents: Float[Tensor, "batch channels h w"]
) -> Float[Tensor, "batch 3 height width"]:
    """Latents → what the autoencoder makes of them, in float32 and for the most part in [-1, 1].

    z = latents / scaling_factor; where the autoencoder has `latents_mean` and `latents_std`, as some of SDXL,
    z = latents · latents_std / scaling_factor + latents_mean.
    """
    vae = _upcast_autoencoder(pipeline)
    mean, deviation = _latent_statistics(pipeline, latents)
    z = latents * deviation / vae.config.scaling_factor + mean
    return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()


def encode_pixels(
    pipeline: DiffusionPipeline,
    pixels: Float[Tensor, "batch 3 height width"],
    generators: torch.Generator | list[torch.Generator] | None,
) -> Float[Tensor, "batch channels h w"]:
    """Pixels in [0, 1] → float32 latents, a sample of what the autoencoder encodes; the inverse of `decode_latents`."""
    vae = _upcast_autoencoder(pipeline)
    encoded = vae.encode(VaeImageProcessor.normalize(pixels.to(vae.device, vae.dtype)))
    z = retrieve_latents(encoded, generator=generators).float()
    mean, deviation = _latent_statistics(pipeline, z)
    return (z - mean) * vae.config.scaling_factor / deviation


def _upcast_autoencoder(pipeline: DiffusionPipeline) -> Any:
    """The autoencoder, in float32 where half precision would overflow, as in SDXL's."""
    vae = pipeline.vae
    if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)
    return vae


def _latent_statistics(pipeline: DiffusionPipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the autoencoder's latents by channel; 0 and 1 where it states none, as most do."""
    config = pipeline.vae.config
    values = [config.get("latents_mean"), config.get("latents_std")]
    if any(value is None for value in values):
        return like.new_zeros(()), like.new_ones(())
    mean, deviation = (torch.tensor(value, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for value in values)
    return mean, deviation
