"""Conversion of open_clip checkpoints to the CLIP model of transformers."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig

from stepfuse.rewards.networks import count_layers, rename
from stepfuse.rewards.published import damage_errors

NAMES = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelled so in transformers
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = ("visual.proj", "text_projection")  # matrices that open_clip stores transposed


def from_open_clip(state: dict[str, Tensor], file: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Convert the state dict of a ViT CLIP model from open_clip to transformers.

    The configuration is derived from the shapes of the tensors; if one that it needs is missing, a ValueError names it
    and `file`. Tensors are float32, and those of other layouts keep their names.
    """
    converted: dict[str, Tensor] = {}
    for original, stored in state.items():
        name, tensor = rename(original, NAMES, BLOCK_NAMES), stored.float()
        block, stacked, parameter = name.partition("attn.in_proj_")
        if stacked:  # query, key and value
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{block}self_attn.{part}_proj.{parameter}"] = values.contiguous()
        elif name != "attn_mask":  # a buffer in files of older versions
            converted[name] = tensor.T.contiguous() if original in TRANSPOSED else tensor
    with damage_errors(file, "an open_clip ViT in the published layout"):
        return _config(state), converted


def _config(state: dict[str, Tensor]) -> CLIPConfig:
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    width, patch = conv.shape[0], conv.shape[-1]
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision = _encoder(state, "visual.", width, 80 if width % 80 == 0 else 64)  # ViT-H has heads of width 80
    vision |= dict(image_size=patch * round((len(positions) - 1) ** 0.5), patch_size=patch)
    text = _encoder(state, "", text_width, 64)
    text |= dict(vocab_size=vocabulary, max_position_embeddings=len(state["positional_embedding"]))
    text |= dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=vision["projection_dim"])


def _encoder(state: dict[str, Tensor], prefix: str, width: int, head_width: int) -> dict[str, Any]:
    blocks = f"{prefix}transformer.resblocks."
    return dict(
        hidden_size=width,
        intermediate_size=len(state[f"{blocks}0.mlp.c_fc.weight"]),
        num_hidden_layers=count_layers(state, blocks),
        num_attention_heads=width // head_width,
        hidden_act="gelu",
        projection_dim=state["text_projection"].shape[1],
    )
