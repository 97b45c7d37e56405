"""Names of the layers of Qwen-Image's transformer, which are the same everywhere."""

from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import QWEN_IMAGE
from stepfuse.fuse.lora.names import Original


@dataclass(frozen=True, kw_only=True)
class QwenImageNames(TransformerNames):
    """Names of the layers of Qwen-Image."""

    family: ClassVar[str] = QWEN_IMAGE
    network_module: ClassVar[str] = "networks.lora_qwen_image"

    def original(self, module: str) -> Original:
        return Original(path=module, modules=(module,))

    @property
    def model(self) -> tuple[str, str]:
        return "qwen_image", "Qwen-Image"
