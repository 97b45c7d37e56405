"""Names of the layers of SANA's transformer: those of diffusers; kohya's files and ComfyUI have no LoRAs of it."""

from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import SANA


@dataclass(frozen=True, kw_only=True)
class SanaNames(TransformerNames):
    """Names of the layers of SANA, none of which kohya's files have."""

    family: ClassVar[str] = SANA
