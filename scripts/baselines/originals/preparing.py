"""Random weights of the originals. It imports torch alone, since it runs beside old packages."""

import zlib

import torch


def fill(model: torch.nn.Module) -> None:
    """Random weights by name, the same on every machine: matrices keep the size of what they multiply.

    With default weights some heads score all images alike; these distinguish images.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 0:  # a logit scale stays
                parameter.copy_(random_tensor(name, parameter.shape))


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """The weights of one name."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return values / values[0].numel() ** 0.5
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
