"""Conversion of open_clip checkpoints to the CLIP model of transformers."""

from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig

from stepfuse.rewards.networks import count_layers, rename

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

    Returns:
        The configuration, derived from the shapes of the tensors, and the state dict in float32, with tensors of other
        layouts under their own names.

    Raises:
        ValueError: If `state` lacks a tensor that the configuration is derived from. The message names it and `file`.
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
    try:
        return _config(state), converted
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{file} lacks a tensor of open_clip's ViT ({error}); expected the published layout"
        ) from error


def _config(state: dict[str, Tensor]) -> CLIPConfig:
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    width, patch = conv.shape[0], conv.shape[-1]
    vocabulary, text_width = state["token_embedding.weight"].shape
    projection = state["text_projection"].shape[1]
    return CLIPConfig(
        vision_config=dict(
            hidden_size=width,
            intermediate_size=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=count_layers(state, "visual.transformer.resblocks."),
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
            num_hidden_layers=count_layers(state, "transformer.resblocks."),
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
