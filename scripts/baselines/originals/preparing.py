"""What the originals need before they can run. Needs torch alone, for it runs beside old packages."""

import zlib

import torch

DEFINED: list = []  # a library that is forgotten takes its definitions along


def define_operators() -> None:
    """torchvision's build for CUDA cannot load its operators beside a torch for CPUs; nothing here calls them."""
    if DEFINED or torch.cuda.is_available():
        return
    DEFINED.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        DEFINED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def fill(model: torch.nn.Module) -> None:
    """Random weights by name, the same on every machine: matrices keep the size of what they multiply.

    As they come, some heads score every image the same; these tell images apart.
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
