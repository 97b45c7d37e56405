"""Which model family a LoRA file is of, by what only that family's layers are called, here or in its own repository."""

import re
from collections.abc import Iterable

STABLE_DIFFUSION = "Stable Diffusion 1.x, 2.x or XL"
STABLE_DIFFUSION_3 = "Stable Diffusion 3"
FLUX_1 = "FLUX.1"
FLUX_2 = "FLUX.2"
QWEN_IMAGE = "Qwen-Image"
Z_IMAGE = "Z-Image"
LUMINA_2 = "Lumina 2"
SANA = "SANA"

# What a path has, its dots underscores, that only paths of these families have.
_SIGNS = {
    r"(?:down|up|input|output)_blocks_\d|mid_block_|middle_block_": (STABLE_DIFFUSION,),
    r"joint_blocks_\d": (STABLE_DIFFUSION_3,),
    r"(?:double|single)_blocks_\d|single_transformer_blocks_\d": (FLUX_1, FLUX_2),
    r"double_blocks_\d+_(?:img|txt)_mod_|single_blocks_\d+_modulation_": (FLUX_1,),
    r"single_transformer_blocks_\d+_(?:proj_|norm_|attn_to_[qkv](?:_|$))": (FLUX_1,),
    r"(?:double|single)_stream_modulation_|transformer_blocks_\d+_ff(?:_context)?_linear_": (FLUX_2,),
    r"single_transformer_blocks_\d+_attn_to_(?:qkv_|out)": (FLUX_2,),
    r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_": (QWEN_IMAGE,),
    r"(?:layers|refiner)_\d+_(?:attention|feed_forward_w|adaLN_)": (Z_IMAGE, LUMINA_2),
    r"(?:layers|refiner)_\d+_(?:attention_to_|adaLN_modulation_0)|all_x_embedder|all_final_layer": (Z_IMAGE,),
    r"(?:layers|refiner)_\d+_(?:attn_|feed_forward_linear_|adaLN_modulation_1)": (LUMINA_2,),
    r"^(?:transformer_)?transformer_blocks_\d+_(?:attn1_to|ff_conv)_": (SANA,),
}
_COMPILED = {re.compile(sign): set(families) for sign, families in _SIGNS.items()}


def families_of(paths: Iterable[str]) -> list[str]:
    """The families that may have all of these layers; none where nothing tells, or parts of several are there."""
    flat = [path.replace(".", "_") for path in paths]
    told = [families for sign, families in _COMPILED.items() if any(sign.search(path) for path in flat)]
    return sorted(set.intersection(*told)) if told else []
