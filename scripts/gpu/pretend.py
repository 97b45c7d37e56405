"""The pretended CUDA device of the tests, and architectures of a few channels in the place of the published ones."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stepfuse.scripts.benchmark.architectures import ARCHITECTURES
from stepfuse.scripts.benchmark.models import AUTOENCODERS, TEXT_ENCODERS
from stepfuse.scripts.gpu.process import Place

ROOT = Path(__file__).parents[2]
UNET: dict[str, Any] = dict(
    sample_size=8,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    mid_block_type=None,
    up_block_types=("CrossAttnUpBlock2D",),
    attention_head_dim=8,
    norm_num_groups=4,
    transformer_layers_per_block=1,
)
WIDTHS: dict[str, Any] = dict(num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32)
NETWORKS: dict[str, dict[str, Any]] = {
    "sd15": UNET | dict(cross_attention_dim=16),
    "sdxl": UNET
    | dict(cross_attention_dim=32, addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16),
    "sd35": WIDTHS | dict(sample_size=8, pos_embed_max_size=8, caption_projection_dim=16, attention_head_dim=8),
    "flux": WIDTHS | dict(attention_head_dim=16, axes_dims_rope=(4, 6, 6)),
}
EMBEDS: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {"prompt_embeds": (5, 16)},
    "sdxl": {"prompt_embeds": (5, 32), "pooled_prompt_embeds": (16,)},
    "sd35": {"prompt_embeds": (5, 64), "pooled_prompt_embeds": (32,)},
    "flux": {"prompt_embeds": (5, 64), "pooled_prompt_embeds": (32,)},
}
TEXT: dict[str, Any] = dict(
    vocab_size=2048,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=16,
)
VAE: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
)


def prepare(place: Place) -> None:
    """Before anything asks for the device: put it and the architectures there for the rest of this process, if asked.

    Nothing is compiled then: there is no compiler for a device that is not there.
    """
    if not place.pretend:
        return
    sys.path.append(str(ROOT))
    from tests.pretended.device import install

    install()
    torch.nn.Module.compile = lambda self, *_, **__: None  # type: ignore[method-assign]
    torch.compile = lambda model, *_, **__: model  # type: ignore[assignment]
    for name, network in NETWORKS.items():
        published = ARCHITECTURES[name]
        ARCHITECTURES[name] = replace(published, config={**published.config, **network}, embeds=EMBEDS[name])
    for name in ("sd15", "sd35"):
        AUTOENCODERS[name] |= VAE
    TEXT_ENCODERS["sd15"] = {"": (CLIPTextModel, TEXT)}
    TEXT_ENCODERS["sd35"] = dict.fromkeys(("", "_2"), (CLIPTextModelWithProjection, TEXT))
