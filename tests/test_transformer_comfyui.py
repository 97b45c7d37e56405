"""Names of transformers' layers that ComfyUI looks for, restated here as facts: it is no package."""

import pytest
import torch
from safetensors.torch import load_file

from stepfuse.fuse.lora.export import save_kohya, save_lora
from tests.fixtures_transformers import (
    IN_KOHYA,
    assert_equal_effects,
    effect,
    effects,
    layers_of,
    names_of,
    random_factors,
    transformer,
)

COMFYUI = {
    # Its networks' layers (comfy/ldm/*), which a file names `lora_unet_` and their path, dots as underscores
    # (comfy/lora.py, model_lora_keys_unet), and the first of their rows that is a layer's of diffusers
    # (comfy/utils.py, mmdit_to_diffusers, flux_to_diffusers, z_image_to_diffusers).
    "sd3": {
        "transformer_blocks.0.attn.to_q": ("joint_blocks_0_x_block_attn_qkv", 0),
        "transformer_blocks.0.attn.to_v": ("joint_blocks_0_x_block_attn_qkv", 32),
        "transformer_blocks.0.attn.add_k_proj": ("joint_blocks_0_context_block_attn_qkv", 16),
        "transformer_blocks.0.attn2.to_k": ("joint_blocks_0_x_block_attn2_qkv", 16),
        "transformer_blocks.0.attn2.to_out.0": ("joint_blocks_0_x_block_attn2_proj", 0),
        "transformer_blocks.1.attn.to_out.0": ("joint_blocks_1_x_block_attn_proj", 0),
        "transformer_blocks.1.attn.to_add_out": ("joint_blocks_1_context_block_attn_proj", 0),
        "transformer_blocks.1.norm1.linear": ("joint_blocks_1_x_block_adaLN_modulation_1", 0),
        "transformer_blocks.1.norm1_context.linear": ("joint_blocks_1_context_block_adaLN_modulation_1", 0),
        "transformer_blocks.2.ff.net.0.proj": ("joint_blocks_2_x_block_mlp_fc1", 0),
        "transformer_blocks.1.ff_context.net.2": ("joint_blocks_1_context_block_mlp_fc2", 0),
        "pos_embed.proj": ("x_embedder_proj", 0),
        "time_text_embed.timestep_embedder.linear_2": ("t_embedder_mlp_2", 0),
        "time_text_embed.text_embedder.linear_1": ("y_embedder_mlp_0", 0),
        "context_embedder": ("context_embedder", 0),
        "proj_out": ("final_layer_linear", 0),
    },
    "flux": {
        "transformer_blocks.0.attn.to_k": ("double_blocks_0_img_attn_qkv", 16),
        "transformer_blocks.0.attn.add_v_proj": ("double_blocks_0_txt_attn_qkv", 32),
        "transformer_blocks.0.attn.to_out.0": ("double_blocks_0_img_attn_proj", 0),
        "transformer_blocks.0.attn.to_add_out": ("double_blocks_0_txt_attn_proj", 0),
        "transformer_blocks.0.norm1.linear": ("double_blocks_0_img_mod_lin", 0),
        "transformer_blocks.0.norm1_context.linear": ("double_blocks_0_txt_mod_lin", 0),
        "transformer_blocks.0.ff.net.0.proj": ("double_blocks_0_img_mlp_0", 0),
        "transformer_blocks.0.ff_context.net.2": ("double_blocks_0_txt_mlp_2", 0),
        "single_transformer_blocks.0.attn.to_v": ("single_blocks_0_linear1", 32),
        "single_transformer_blocks.0.proj_mlp": ("single_blocks_0_linear1", 48),
        "single_transformer_blocks.0.proj_out": ("single_blocks_0_linear2", 0),
        "single_transformer_blocks.0.norm.linear": ("single_blocks_0_modulation_lin", 0),
        "time_text_embed.guidance_embedder.linear_1": ("guidance_in_in_layer", 0),
        "time_text_embed.text_embedder.linear_2": ("vector_in_out_layer", 0),
        "x_embedder": ("img_in", 0),
        "context_embedder": ("txt_in", 0),
        "proj_out": ("final_layer_linear", 0),
    },
    "flux2": {
        "transformer_blocks.0.attn.to_q": ("double_blocks_0_img_attn_qkv", 0),
        "transformer_blocks.0.attn.add_k_proj": ("double_blocks_0_txt_attn_qkv", 16),
        "transformer_blocks.0.ff.linear_in": ("double_blocks_0_img_mlp_0", 0),
        "transformer_blocks.0.ff_context.linear_out": ("double_blocks_0_txt_mlp_2", 0),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": ("single_blocks_0_linear1", 0),
        "single_transformer_blocks.0.attn.to_out": ("single_blocks_0_linear2", 0),
        "double_stream_modulation_txt.linear": ("double_stream_modulation_txt_lin", 0),
        "single_stream_modulation.linear": ("single_stream_modulation_lin", 0),
        "time_guidance_embed.timestep_embedder.linear_1": ("time_in_in_layer", 0),
    },
    "qwen": {
        "transformer_blocks.1.attn.to_q": ("transformer_blocks_1_attn_to_q", 0),
        "transformer_blocks.1.attn.add_v_proj": ("transformer_blocks_1_attn_add_v_proj", 0),
        "transformer_blocks.1.attn.to_out.0": ("transformer_blocks_1_attn_to_out_0", 0),
        "transformer_blocks.0.img_mlp.net.0.proj": ("transformer_blocks_0_img_mlp_net_0_proj", 0),
        "transformer_blocks.0.txt_mod.1": ("transformer_blocks_0_txt_mod_1", 0),
        "norm_out.linear": ("norm_out_linear", 0),
    },
    "z_image": {
        "layers.1.attention.to_k": ("layers_1_attention_qkv", 16),
        "layers.1.attention.to_out.0": ("layers_1_attention_out", 0),
        "layers.0.feed_forward.w2": ("layers_0_feed_forward_w2", 0),
        "layers.0.adaLN_modulation.0": ("layers_0_adaLN_modulation_0", 0),
        "noise_refiner.0.attention.to_v": ("noise_refiner_0_attention_qkv", 32),
        "context_refiner.0.feed_forward.w1": ("context_refiner_0_feed_forward_w1", 0),
        "all_x_embedder.2-1": ("x_embedder", 0),
        "all_final_layer.2-1.adaLN_modulation.1": ("final_layer_adaLN_modulation_1", 0),
        "cap_embedder.1": ("cap_embedder_1", 0),
    },
    "lumina2": {  # comfy/ldm/lumina/model.py, and sd-scripts' library/lumina_models.py
        "layers.0.attn.to_q": ("layers_0_attention_qkv", 0),
        "layers.0.attn.to_v": ("layers_0_attention_qkv", 32),
        "layers.0.feed_forward.linear_3": ("layers_0_feed_forward_w3", 0),
        "layers.0.norm1.linear": ("layers_0_adaLN_modulation_1", 0),
        "context_refiner.0.attn.to_out.0": ("context_refiner_0_attention_out", 0),
        "time_caption_embed.caption_embedder.1": ("cap_embedder_1", 0),
        "norm_out.linear_2": ("final_layer_linear", 0),
    },
}
SWAPPED = {  # of these the second half of rows comes first
    "sd3": {
        "norm_out.linear": "final_layer_adaLN_modulation_1",
        "transformer_blocks.2.norm1_context.linear": "joint_blocks_2_context_block_adaLN_modulation_1",
    },
    "flux": {"norm_out.linear": "final_layer_adaLN_modulation_1"},
    "flux2": {"norm_out.linear": "final_layer_adaLN_modulation_1"},
}


@pytest.mark.parametrize("family", IN_KOHYA)
def test_comfyui_finds_each_layer_of_a_kohya_export_in_its_own_network(family, tmp_path):
    network = transformer(family)
    factors = random_factors(layers_of(network), alpha=5)
    save_kohya(tmp_path / "x.safetensors", factors, names_of(family, network), title="x", prediction="flow_prediction")
    state, expected, got = load_file(tmp_path / "x.safetensors"), {}, {}
    swapped = {module: (name, 0) for module, name in SWAPPED.get(family, {}).items()}
    for module, (name, first) in (COMFYUI[family] | swapped).items():
        layer, stem = factors[module], f"lora_unet_{name}"
        down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
        rows = effect(down, up, float(state[f"{stem}.alpha"]) / len(down))[first : first + len(layer.up)]
        got[module] = torch.cat(rows.chunk(2)[::-1]) if module in swapped else rows
        expected[module] = effect(layer.down, layer.up, layer.scaling)
    assert_equal_effects(got, expected)
    known = {name for name, _ in (COMFYUI[family] | swapped).values()}
    kinds = {key.partition(".")[0].removeprefix("lora_unet_") for key in state}
    assert known <= kinds


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen", "z_image"])
def test_comfyui_finds_each_layer_of_a_sets_file_by_diffusers_path(family, tmp_path):
    """It looks for `transformer.`, the path and one of a few names of factors, and takes alpha for the rank."""
    network = transformer(family)
    factors = random_factors(layers_of(network), alpha=5)
    save_lora(tmp_path / "x.safetensors", factors, "transformer")
    state = load_file(tmp_path / "x.safetensors")
    stems = {module: f"transformer.{module}.lora" for module in factors}
    assert state.keys() == {f"{stem}.{factor}.weight" for stem in stems.values() for factor in ("down", "up")}
    got = {module: effect(state[f"{stem}.down.weight"], state[f"{stem}.up.weight"]) for module, stem in stems.items()}
    assert_equal_effects(got, effects(factors))
