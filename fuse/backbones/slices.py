"""How many images an autoencoder decodes or encodes at once: as many as fit into a share of the memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepfuse.data.devices import without_autocast
from stepfuse.data.out_of_memory import is_out_of_memory

# Feature maps of the widest size that a decoder holds at once: of a residual block the input, the normalised input and
# the output of a convolution. Of a differentiable decode all that the backward pass reads: in a decoder of Stable
# Diffusion 13 in the blocks at full resolution, and 5.75, 2.25 and 0.6 at the halves of it.
MAPS = 3
MAPS_WITH_GRADIENTS = 22
HOST_BYTES = 8 * 2**30  # on the CPU a fixed amount, so that the slices of a run are always the same


def run_in_slices(
    run: Callable[[slice], Tensor], vae: Any, batch: Tensor, *, latent_size: Sequence[int], at_once: int | None
) -> Tensor:
    """The results of `run` for slices of a batch, joined; outside autocast, in the precision of the tensors.

    A slice that does not fit into memory is run again as two. With gradients, and more than one slice, the activations
    of a slice are computed again in the backward pass, so that those of one slice exist at a time.

    Args:
        run: a pass of the autoencoder over some rows of the batch.
        batch: its rows are images.
        latent_size: height and width of a latent.
        at_once: the most images of a slice; by default what `images_at_once` says.
    """
    gradients = torch.is_grad_enabled() and batch.requires_grad
    size = at_once or images_at_once(vae, latent_size, batch.device, gradients=gradients)
    size = min(size, len(batch))
    parts: list[Tensor] = []
    begin = 0
    with without_autocast(batch.device):
        while begin < len(batch):
            rows = slice(begin, begin + size)
            try:
                if gradients and size < len(batch):
                    part = checkpoint(run, rows, use_reentrant=False, preserve_rng_state=False)
                else:
                    part = run(rows)
            except (MemoryError, RuntimeError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size = (size + 1) // 2
                continue
            parts.append(part)
            begin += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def images_at_once(vae: Any, latent_size: Sequence[int], device: torch.device, *, gradients: bool = False) -> int:
    """How many images fit into the memory that a decode may take; at least one."""
    each = bytes_per_image(vae, latent_size, gradients=gradients)
    return max(1, available_bytes(device) // each)


def bytes_per_image(vae: Any, latent_size: Sequence[int], *, gradients: bool = False) -> int:
    """The activations of one image in the decoder, estimated from its configuration.

        pixels · channels · bytes of a number · feature maps

    The widest feature map is that at full resolution with the channels of the level below it, which the upsampling
    hands over: of an SDXL image in float32, 1024² · 256 · 4 bytes = 1 GiB, and 3 GiB for the 3 that exist at a time.
    """
    widths = _channels(vae.config)
    pixels = latent_size[0] * latent_size[1] * 4 ** (levels(vae) - 1)
    maps = MAPS_WITH_GRADIENTS if gradients else MAPS
    return pixels * max(widths[:2]) * vae.dtype.itemsize * maps


def available_bytes(device: torch.device) -> int:
    """What a decode may take: of a GPU an eighth of its memory, but no more than half of what is free.

    So slices are the same from call to call, unless the memory is nearly full.
    """
    if device.type != "cuda":
        return HOST_BYTES
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(total // 8, (free + cached) // 2)


def levels(vae: Any) -> int:
    """The resolutions of its feature maps, each half of the one before it."""
    return len(_channels(vae.config))


def _channels(config: Any) -> Sequence[int]:
    """Of the decoder's levels, that at full resolution first."""
    if multiples := config.get("dim_mult"):
        return [config["base_dim"] * multiple for multiple in multiples]
    return config.get("decoder_block_out_channels") or config["block_out_channels"]
