"""Names of the layers of Stable Diffusion 3's transformer in Stability's own (MMDiT)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import STABLE_DIFFUSION_3
from stepfuse.fuse.lora.names import Original

OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


@dataclass(frozen=True, kw_only=True)
class StableDiffusion3Names(TransformerNames):
    """Names of the layers of Stable Diffusion 3 and 3.5."""

    family: ClassVar[str] = STABLE_DIFFUSION_3
    outside: ClassVar[Mapping[str, str]] = OUTSIDE
    blocks: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {"transformer_blocks": ("joint_blocks", BLOCK)}
    swapped: ClassVar[Sequence[str]] = ("norm_out.linear",)
    network_module: ClassVar[str] = "networks.lora_sd3"

    @property
    def model(self) -> tuple[str, str]:
        """Told apart by what the network has, as in sd-scripts (library/sd3_utils.py)."""
        name = "medium"
        if self.config.get("qk_norm") is not None:
            name = "5-medium" if self.config.get("dual_attention_layers") else "5-large"
        return name, f"stable-diffusion-3-{name}"

    def original(self, module: str) -> Original | None:
        """The text's side of the last block ends there: it has a scale and a shift only, as the last layer has."""
        found = super().original(module)
        last = f"transformer_blocks.{self.config['num_layers'] - 1}.norm1_context.linear"
        return replace(found, swapped=True) if found is not None and module == last else found
