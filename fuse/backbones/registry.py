"""The model families, by the class of their pipeline."""

from diffusers import DiffusionPipeline

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.unet import StableDiffusion, StableDiffusionXL

BACKBONES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}


def backbone_class(name: str) -> type[Backbone]:
    """The family of a pipeline class, by the name of that.

    Raises:
        ValueError: for a class that is not in `BACKBONES`.
    """
    if name not in BACKBONES:
        raise ValueError(
            f"{name} is of no model family that stepfuse knows; expected {' or '.join(BACKBONES)}"
            f"{nearest(name, BACKBONES)}"
        )
    return BACKBONES[name]


def backbone_of(pipeline: DiffusionPipeline) -> Backbone:
    """A pipeline as a backbone; its class, or one that it is derived from, is in `BACKBONES`.

    Raises:
        ValueError: for a pipeline of another family.
    """
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    return backbone_class(next((name for name in names if name in BACKBONES), names[0]))(pipeline)


def parts() -> tuple[str, ...]:
    """The names that the families' pipelines have for the network, which are the prefixes of keys in LoRA files."""
    return tuple(dict.fromkeys(backbone.part for backbone in BACKBONES.values()))
