"""LoRAs that are of no layer of a transformer, or in doubt, are refused in one line that says what they are of."""

import pytest
import torch

from stepfuse.fuse.backbones.unet_names import UNetNames
from stepfuse.fuse.lora.convert import read_foreign
from stepfuse.fuse.lora.export import save_kohya, save_lora
from tests.fixtures_tiny import refused
from tests.fixtures_transformers import (
    FAMILIES,
    kohya_name,
    layers_of,
    names_of,
    original_state,
    random_factors,
    read,
    save_state,
    transformer,
)


@pytest.mark.parametrize("base", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("of", FAMILIES)
def test_a_file_of_another_family_is_refused_by_the_names_of_both(of, base, layout, tmp_path):
    """Only a file of SD 3 under diffusers' names has no layer that is not some other family's too."""
    network, other = transformer(of), transformer(base)
    if of == base or (of, layout) in (("sd3", "diffusers"), ("sana", "kohya")):
        return
    factors = random_factors(layers_of(network))
    file = tmp_path / "x.safetensors"
    if layout == "kohya":
        save_kohya(file, factors, names_of(of, network), title="x", prediction="epsilon")
    else:
        save_lora(file, factors, "transformer")
    theirs, ours = names_of(of, network).family, names_of(base, other).family
    with refused(str(file), f"this is a LoRA of {theirs} and the base is {ours}"):
        read(file, base, other)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "LoRA of FLUX.1 or FLUX.2 and the base is Stab"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "LoRA of Stable Diffusion 1.x, 2.x or XL and"),
        ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", "LoRA of Stable Diffusion 1.x, 2.x or XL and"),
        ("transformer.transformer_blocks.9.attn.to_q.lora_A.weight", "no layer 'transformer_blocks.9.attn.to_q'"),
        ("transformer.transformer_blocks.2.attn.to_add_out.lora_A.weight", "no layer 'transformer_blocks.2.attn.to_ad"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a", "a LoHa"),
        ("controlnet.x.lora_A.weight", "another network than the base's"),
    ],
)
def test_anything_else_is_refused_for_what_it_is(key, told, tmp_path):
    file = save_state({key: torch.ones(2, 16)}, tmp_path / "x.safetensors")
    with refused(str(file), told):
        read(file, "sd3", transformer("sd3"))


def test_a_unet_says_so_too(tmp_path):
    network = transformer("flux")
    save_lora(tmp_path / "x.safetensors", random_factors(layers_of(network)), "transformer")
    with refused("this is a LoRA of FLUX.1 and the base is Stable Diffusion 1.x, 2.x or XL"):
        names = UNetNames(config={"layers_per_block": 1, "up_block_types": ()})
        read_foreign(tmp_path / "x.safetensors", torch.nn.Sequential(), names, network_only=False)


def test_a_layer_twice_in_two_spellings_is_refused(tmp_path):
    network = transformer("flux")
    state = original_state("flux", network, kohya_name, where="transformer_blocks.0.attn.to_q")
    layer = random_factors({"to_q": layers_of(network)["transformer_blocks.0.attn.to_q"]})["to_q"]
    state["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] = layer.down
    state["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = layer.up
    with refused("transformer_blocks.0.attn.to_q", "one layout in a file"):
        read(save_state(state, tmp_path / "x.safetensors"), "flux", network)


def test_a_joined_layer_of_another_width_is_refused_by_its_own_name(tmp_path):
    state = original_state("sd3", transformer("sd3"), kohya_name, where="attn.to_q")
    wider = transformer("sd3", num_attention_heads=4, caption_projection_dim=32)
    with refused("x_block.attn.qkv", "[48, 16]", "[96, 32]", "another base"):
        read(save_state(state, tmp_path / "x.safetensors"), "sd3", wider)
