"""Names of the layers of Lumina 2's transformer in Alpha-VLLM's own (NextDiT)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import LUMINA_2

OUTSIDE = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
BLOCK = {
    "attn.to_q": "attention.qkv",
    "attn.to_k": "attention.qkv",
    "attn.to_v": "attention.qkv",
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}


@dataclass(frozen=True, kw_only=True)
class Lumina2Names(TransformerNames):
    """Names of the layers of Lumina 2."""

    family: ClassVar[str] = LUMINA_2
    outside: ClassVar[Mapping[str, str]] = OUTSIDE
    blocks: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        name: (name, BLOCK) for name in ("layers", "noise_refiner", "context_refiner")
    }
    network_module: ClassVar[str] = "networks.lora_lumina"

    @property
    def model(self) -> tuple[str, str]:
        return "lumina2", "lumina-2"

    def rows(self, layer: str) -> int:
        """Several heads of queries share those of a key and a value."""
        heads = self.config["num_attention_heads"]
        own = heads if layer == "attn.to_q" else self.config["num_kv_heads"]
        return self.config["hidden_size"] // heads * own
