"""Autoencoders of diffusers: latents of a denoiser ↔ pixels."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.library_messages import retrieve_latents
from stepfuse.fuse.diffusion.gaussian import Generators

Latents = Float[Tensor, "_ channels height width"]
Pixels = Float[Tensor, "batch 3 image_height image_width"]  # other sizes than those of `Latents`


def decode(vae: Any, latents: Latents) -> Pixels:
    """The pixels, in float32 and for the most part in [-1, 1], of latents of a denoiser.

        z = latents · std / scaling_factor + mean + shift

    `latents_mean` and `latents_std` are of the autoencoder's configuration, by channel, as some of SDXL have them;
    `shift_factor` is as those of flow transformers have it.
    """
    _upcast(vae)
    mean, deviation = statistics(vae, latents)
    z = latents * deviation / vae.config.scaling_factor + mean
    if shift := vae.config.get("shift_factor"):
        z = z + shift
    return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()


def encode(vae: Any, pixels: Pixels, generators: Generators) -> Latents:
    """Float32 latents of pixels in [0, 1]: a sample of what the autoencoder encodes; the inverse of `decode`."""
    _upcast(vae)
    encoded = vae.encode(VaeImageProcessor.normalize(pixels.to(vae.device, vae.dtype)))
    z = retrieve_latents(encoded, generator=generators).float()
    mean, deviation = statistics(vae, z)
    if shift := vae.config.get("shift_factor"):
        z = z - shift
    return (z - mean) * vae.config.scaling_factor / deviation


def _upcast(vae: Any) -> None:
    """To float32 where half precision would overflow, as in SDXL's."""
    if vae.config.get("force_upcast", False) and vae.dtype == torch.float16:
        vae.to(torch.float32)


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the autoencoder's latents by channel; 0 and 1 where it states none, as most do."""
    values = [vae.config.get("latents_mean"), vae.config.get("latents_std")]
    if any(value is None for value in values):
        return like.new_zeros(()), like.new_ones(())
    mean, deviation = (torch.tensor(value, device=like.device, dtype=like.dtype).view(1, -1, 1, 1) for value in values)
    return mean, deviation
