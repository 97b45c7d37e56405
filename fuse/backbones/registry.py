"""The model families, by the class of their pipeline."""

from collections.abc import Sequence

import diffusers
from diffusers import DiffusionPipeline

from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.flux import Flux
from stepfuse.fuse.backbones.flux2 import Flux2, Flux2Klein
from stepfuse.fuse.backbones.lumina2 import Lumina2
from stepfuse.fuse.backbones.qwen_image import QwenImage
from stepfuse.fuse.backbones.sana import Sana
from stepfuse.fuse.backbones.sd3 import StableDiffusion3
from stepfuse.fuse.backbones.unet import StableDiffusion, StableDiffusionXL
from stepfuse.fuse.backbones.z_image import ZImage

BACKBONES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
    "SanaPipeline": Sana,
    "Lumina2Pipeline": Lumina2,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
}


def backbone_class(name: str) -> type[Backbone]:
    """The family of one of diffusers' pipeline classes; ValueError for one not derived from any in `BACKBONES`."""
    found = getattr(diffusers, name) if name not in BACKBONES and hasattr(diffusers, name) else None
    return _family([name, *(_names(found) if isinstance(found, type) else ())])


def backbone_of(pipeline: DiffusionPipeline) -> Backbone:
    """A pipeline as a backbone; see `backbone_class`."""
    return _family(_names(type(pipeline)))(pipeline)


def _family(names: Sequence[str]) -> type[Backbone]:
    """The first family there is of pipeline classes, by their names."""
    for name in names:
        if name in BACKBONES:
            return BACKBONES[name]
    raise ValueError(
        f"{names[0]} is of no model family that stepfuse knows; expected one of {', '.join(BACKBONES)}"
        f"{nearest(names[0], BACKBONES)}"
    )


def _names(pipeline_class: type) -> list[str]:
    return [kind.__name__ for kind in pipeline_class.__mro__]


def parts() -> tuple[str, ...]:
    """The names that the families' pipelines have for the network, which are the prefixes of keys in LoRA files."""
    return tuple(dict.fromkeys(backbone.part for backbone in BACKBONES.values()))


def known_embeds() -> tuple[str, ...]:
    """The arguments that take embeddings in some family, each once."""
    return tuple(dict.fromkeys(name for backbone in BACKBONES.values() for name in backbone.embeds))
