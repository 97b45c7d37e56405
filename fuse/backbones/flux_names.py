"""Names of the layers of FLUX.1's transformer in Black Forest Labs' own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import FLUX_1

OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
ATTENTION = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
}
DOUBLE = ATTENTION | {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
}


@dataclass(frozen=True, kw_only=True)
class FluxNames(TransformerNames):
    """Names of the layers of FLUX.1."""

    family: ClassVar[str] = FLUX_1
    outside: ClassVar[Mapping[str, str]] = OUTSIDE
    blocks: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "transformer_blocks": ("double_blocks", DOUBLE),
        "single_transformer_blocks": ("single_blocks", SINGLE),
    }
    swapped: ClassVar[Sequence[str]] = ("norm_out.linear",)
    network_module: ClassVar[str] = "networks.lora_flux"

    @property
    def model(self) -> tuple[str, str]:
        """FLUX.1 [schnell] is not told the guidance scale."""
        return "flux1", f"flux-1-{'dev' if self.config.get('guidance_embeds') else 'schnell'}"

    def rows(self, layer: str) -> int:
        return super().rows(layer) * (4 if layer == "proj_mlp" else 1)
