"""Autoencoders of diffusers: latents of a denoiser ↔ pixels."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.data.library_messages import retrieve_latents
from stepfuse.fuse.backbones.slices import levels, run_in_slices
from stepfuse.fuse.diffusion.gaussian import Generators

Latents = Float[Tensor, "_ channels height width"]
Pixels = Float[Tensor, "batch 3 image_height image_width"]  # other sizes than those of `Latents`


def decode(vae: Any, latents: Latents, *, at_once: int | None = None) -> Pixels:
    """The pixels, in float32 and for the most part in [-1, 1], of latents of a denoiser.

        z = latents · std / scaling_factor + mean + shift

    `latents_mean` and `latents_std` are of the autoencoder's configuration, by channel, as some of SDXL have them;
    `shift_factor` is as those of flow transformers have it. `at_once` is the most images that are decoded together; by
    default it depends on the memory.
    """
    mean, deviation = statistics(vae, latents)
    z = latents * deviation / vae.config.scaling_factor + mean
    if shift := vae.config.get("shift_factor"):
        z = z + shift
    return run_decoder(vae, z, at_once)


def run_decoder(vae: Any, z: Tensor, at_once: int | None = None) -> Tensor:
    """The decoder's output in float32, of latents as it takes them."""
    upcast(vae)

    def run(rows: slice) -> Tensor:
        return vae.decode(z[rows].to(vae.dtype), return_dict=False)[0].float()

    return run_in_slices(run, vae, z, latent_size=z.shape[-2:], at_once=at_once)


def encode(vae: Any, pixels: Pixels, generators: Generators, *, at_once: int | None = None) -> Latents:
    """Float32 latents of pixels in [0, 1]: a sample of what the autoencoder encodes; the inverse of `decode`."""
    z = run_encoder(vae, encoder_input(vae, pixels), generators, at_once)
    mean, deviation = statistics(vae, z)
    if shift := vae.config.get("shift_factor"):
        z = z - shift
    return (z - mean) * vae.config.scaling_factor / deviation


def encoder_input(vae: Any, pixels: Pixels) -> Tensor:
    """Pixels in [0, 1] as an encoder takes them: in [-1, 1], on its device and in its precision."""
    upcast(vae)
    return VaeImageProcessor.normalize(to_device(pixels, vae.device, vae.dtype))


def run_encoder(
    vae: Any,
    images: Tensor,
    generators: Generators,
    at_once: int | None = None,
    retrieve: Callable[..., Tensor] = retrieve_latents,
) -> Tensor:
    """Samples, in float32, of what the encoder makes of images as it takes them.

    Args:
        retrieve: a sample of the encoder's output, given `generator`.
    """

    def run(rows: slice) -> Tensor:
        drawn_by = generators[rows] if isinstance(generators, list) else generators
        return retrieve(vae.encode(images[rows]), generator=drawn_by).float()

    factor = 2 ** (levels(vae) - 1)
    size = [side // factor for side in images.shape[-2:]]
    return run_in_slices(run, vae, images, latent_size=size, at_once=at_once)


def upcast(vae: Any) -> None:
    """Move an autoencoder to float32 where half precision would overflow, as in SDXL's.

    That is done when a pipeline becomes a backbone, so that all is decoded and encoded in the same precision, and again
    for a pipeline that was cast since. diffusers' own pipelines do it around every decode.
    """
    if vae is not None and vae.config.get("force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the autoencoder's latents by channel; 0 and 1 where it states none, as most do."""
    values = [vae.config.get("latents_mean"), vae.config.get("latents_std")]
    if any(value is None for value in values):
        return like.new_zeros(()), like.new_ones(())
    on_host = (torch.tensor(value, dtype=like.dtype).view(1, -1, 1, 1) for value in values)
    mean, deviation = (to_device(value, like.device) for value in on_host)
    return mean, deviation
