"""Conversion of open_clip checkpoints to the CLIP model of transformers."""

import re
from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig

BLOCK = (
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"ln_([12])", r"layer_norm\1"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
)
NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Matrices that open_clip stores transposed.
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def from_open_clip(state: dict[str, Tensor], file: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Convert the state dict of a ViT CLIP model from open_clip to transformers.

    Returns:
        The configuration, derived from the shapes of the tensors, and the state dict in float32.

    Raises:
        ValueError: If `state` has another layout. The message names a tensor and `file`.
    """
    converted: dict[str, Tensor] = {}
    for name, original in state.items():
        tensor = original.float() if original.is_floating_point() else original
        match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if match:
            tower = "vision_model" if match[1] else "text_model"
            converted |= _convert_block(f"{tower}.encoder.layers.{match[2]}.", match[3], tensor)
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = tensor.T.contiguous()
        elif name in NAMES:
            converted[NAMES[name]] = tensor
        elif name != "attn_mask":  # a buffer in files of older versions
            raise ValueError(f"{file} has a tensor {name}; expected the layout of open_clip's ViT")
    try:
        return _config(state), converted
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{file} lacks a tensor of open_clip's ViT ({error}); expected the published layout"
        ) from error


def _convert_block(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Convert a tensor of a transformer block. open_clip stacks query, key and value in this order in one tensor."""
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        parameter = name.rpartition("_")[2]
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}.{parameter}": values.contiguous() for part, values in parts}
    for pattern, replacement in BLOCK:
        name = re.sub(rf"^{pattern}(?=\.)", replacement, name)
    return {prefix + name: tensor}


def _config(state: dict[str, Tensor]) -> CLIPConfig:
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    width, patch = conv.shape[0], conv.shape[-1]
    vocabulary, text_width = state["token_embedding.weight"].shape
    projection = state["text_projection"].shape[1]
    return CLIPConfig(
        vision_config=dict(
            hidden_size=width,
            intermediate_size=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=_layers(state, "visual.transformer.resblocks."),
            num_attention_heads=width // (80 if width % 80 == 0 else 64),  # ViT-H has heads of width 80
            image_size=patch * round((len(positions) - 1) ** 0.5),
            patch_size=patch,
            hidden_act="gelu",
            projection_dim=projection,
        ),
        text_config=dict(
            vocab_size=vocabulary,
            hidden_size=text_width,
            intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=_layers(state, "transformer.resblocks."),
            num_attention_heads=text_width // 64,
            max_position_embeddings=len(state["positional_embedding"]),
            hidden_act="gelu",
            projection_dim=projection,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        ),
        projection_dim=projection,
    )


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))
