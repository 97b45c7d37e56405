"""Names of the layers of Z-Image's transformer in ComfyUI, whose class for it is Lumina 2's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import Z_IMAGE

OUTSIDE = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
}
BLOCK = {
    "attention.to_q": "attention.qkv",
    "attention.to_k": "attention.qkv",
    "attention.to_v": "attention.qkv",
    "attention.to_out.0": "attention.out",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}


@dataclass(frozen=True, kw_only=True)
class ZImageNames(TransformerNames):
    """Names of the layers of Z-Image."""

    family: ClassVar[str] = Z_IMAGE
    outside: ClassVar[Mapping[str, str]] = OUTSIDE
    blocks: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        name: (name, BLOCK) for name in ("layers", "noise_refiner", "context_refiner")
    }
    network_module: ClassVar[str] = "networks.lora_zimage"

    @property
    def model(self) -> tuple[str, str]:
        return "z_image", "Z-Image"

    def rows(self, layer: str) -> int:
        return self.config["dim"]
