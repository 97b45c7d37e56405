"""Names of the layers of FLUX.2's transformer in Black Forest Labs' own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepfuse.fuse.backbones.flux_names import ATTENTION
from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.lora.families import FLUX_2

OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = ATTENTION | {
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
MODELS = {24: "-klein-4b", 32: "-klein-9b", 48: "-dev"}  # by the number of heads


@dataclass(frozen=True, kw_only=True)
class Flux2Names(TransformerNames):
    """Names of the layers of FLUX.2, Klein or not."""

    family: ClassVar[str] = FLUX_2
    outside: ClassVar[Mapping[str, str]] = OUTSIDE
    blocks: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "transformer_blocks": ("double_blocks", DOUBLE),
        "single_transformer_blocks": ("single_blocks", SINGLE),
    }
    swapped: ClassVar[Sequence[str]] = ("norm_out.linear",)
    network_module: ClassVar[str] = "networks.lora_flux_2"

    @property
    def model(self) -> tuple[str, str]:
        return "flux2", f"Flux.2{MODELS.get(self.config['num_attention_heads'], '')}"
