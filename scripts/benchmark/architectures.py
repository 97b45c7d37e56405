"""Published architectures that benchmarks build with random weights. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline's denoising network, as its published checkpoint has it.

    Attributes:
        pipeline, network: names of diffusers' classes.
        config: of the network, beside the defaults of its class.
        flow: of FlowMatchEulerDiscreteScheduler, beside its defaults; None for Stable Diffusion's DDIM.
        embeds: shapes of a prompt's embeddings, by the names of the arguments that give them in place of prompts.
        depth: the numbers of layers, by their keys in `config`; empty where the depth cannot be reduced.
    """

    pipeline: str
    network: str
    config: Mapping[str, Any]
    flow: Mapping[str, Any] | None = None
    embeds: Mapping[str, tuple[int, ...]]
    depth: Mapping[str, int] = field(default_factory=dict)

    def reduced(self, layers: int) -> dict[str, int]:
        """The numbers of layers of a network of this depth, its kinds in the published ratio; 0 is all of them.

        Raises:
            ValueError: for a depth that the network cannot have.
        """
        total, least = sum(self.depth.values()), len(self.depth)
        if layers == 0:
            return dict(self.depth)
        if not self.depth:
            raise ValueError(f"layers {layers}, but the depth of {self.network} cannot be reduced; expected 0")
        if not least <= layers <= total:
            raise ValueError(f"layers {layers}; expected {least} to {total} for {self.network}, or 0 for all")
        return {name: max(1, round(count * layers / total)) for name, count in self.depth.items()}

    def stated_depth(self, layers: int) -> str:
        """How deep a network of so many layers is, `4 of 24 layers`; nothing where the depth cannot be reduced."""
        return f"{sum(self.reduced(layers).values())} of {sum(self.depth.values())} layers" if self.depth else ""


ARCHITECTURES = {
    # stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0
    "sd15": Architecture(
        pipeline="StableDiffusionPipeline",
        network="UNet2DConditionModel",
        config=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        embeds={"prompt_embeds": (77, 768)},
    ),
    "sdxl": Architecture(
        pipeline="StableDiffusionXLPipeline",
        network="UNet2DConditionModel",
        config=dict(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        embeds={"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
    ),
    # stable-diffusion-3.5-medium; 77 tokens of CLIP and 256 of T5
    "sd35": Architecture(
        pipeline="StableDiffusion3Pipeline",
        network="SD3Transformer2DModel",
        config=dict(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            in_channels=16,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        flow=dict(shift=3.0),
        embeds={"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
        depth={"num_layers": 24},
    ),
    # FLUX.1-dev
    "flux": Architecture(
        pipeline="FluxPipeline",
        network="FluxTransformer2DModel",
        config=dict(num_layers=19, num_single_layers=38, guidance_embeds=True),
        flow=dict(shift=3.0, use_dynamic_shifting=True),
        embeds={"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        depth={"num_layers": 19, "num_single_layers": 38},
    ),
    # Qwen-Image; a prompt's length is its own
    "qwen": Architecture(
        pipeline="QwenImagePipeline",
        network="QwenImageTransformer2DModel",
        config=dict(num_layers=60),
        flow=dict(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        embeds={"prompt_embeds": (128, 3584)},
        depth={"num_layers": 60},
    ),
}
TRAINED = ("sd15", "sdxl", "sd35")  # of which `benchmark training` makes text encoders and an autoencoder
