"""LoRAs of transformers from other tools are read as diffusers reads them, whatever they call a layer, or refused."""

import pytest
import torch
from safetensors.torch import load_file

from stepfuse.fuse.lora.export import save_kohya, save_lora, save_peft
from stepfuse.fuse.lora.factors import peft_state
from tests.fixtures_formats import assert_same
from tests.fixtures_tiny import refused
from tests.fixtures_transformers import (
    FAMILIES,
    IN_KOHYA,
    assert_equal_effects,
    diffusers_effects,
    effect,
    effects,
    kohya_name,
    layers_of,
    lora_pipeline,
    names_of,
    original_state,
    random_factors,
    read,
    save_state,
    transformer,
)

# Out and in again


@pytest.mark.parametrize("family", IN_KOHYA)
@pytest.mark.parametrize("some", ["", "att", "to_k"])
def test_a_kohya_export_is_read_back(family, some, tmp_path):
    """Layer by layer, whichever of those that are one there have a LoRA; of rank 2 and not of the joined layer's."""
    network = transformer(family)
    layers = {name: layer for name, layer in layers_of(network).items() if some in name}
    factors = random_factors(layers, alpha=3)
    file = tmp_path / "x.safetensors"
    save_kohya(file, factors, names_of(family, network), title="x", prediction="flow_prediction")
    assert_same(read(file, family, network), factors)


def test_ranks_of_joined_layers_may_differ(tmp_path):
    network = transformer("sd3")
    layers = layers_of(network)
    factors = {
        name: random_factors({name: layers[name]}, rank=rank, alpha=5)[name]
        for rank, name in enumerate(("to_q", "to_k", "to_v"), 1)
        for name in [f"transformer_blocks.1.attn.{name}"]
    }
    file = tmp_path / "x.safetensors"
    save_kohya(file, factors, names_of("sd3", network), title="x", prediction="flow_prediction")
    (down,) = (value for key, value in load_file(file).items() if "down" in key)
    assert len(down) == 1 + 2 + 3
    assert_same(read(file, "sd3", network), factors)


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_to_diffusers_and_peft_are_read_back(family, tmp_path):
    network = transformer(family)
    factors = random_factors(layers_of(network), alpha=3)
    save_lora(tmp_path / "x.safetensors", factors, "transformer")
    save_peft(tmp_path / "peft", factors, "OWNER/BASE")
    for place in (tmp_path / "x.safetensors", tmp_path / "peft"):
        assert_same(read(place, family, network), factors)


@pytest.mark.parametrize("family", IN_KOHYA)
def test_a_file_of_the_original_network_comes_out_as_it_came_in(family, tmp_path):
    """Whose joined layers share their A, at its rank; the scale is in B."""
    network = transformer(family)
    state = original_state(family, network, kohya_name, down="lora_down", up="lora_up", alpha=2.0)
    factors = read(save_state(state, tmp_path / "in.safetensors"), family, network)
    save_kohya(tmp_path / "x.safetensors", factors, names_of(family, network), title="x", prediction="epsilon")
    save_lora(tmp_path / "own.safetensors", factors, "transformer")
    assert_same(read(tmp_path / "own.safetensors", family, network), factors)
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], value) for key, value in state.items())


# Spellings


SPELLINGS = {
    "ComfyUI": (lambda path: f"diffusion_model.{path}", "lora_A", "lora_B"),
    "ComfyUI, downwards": (lambda path: f"model.diffusion_model.{path}", "lora_down", "lora_up"),
    "bare": (str, "lora_A", "lora_B"),
    "sd-scripts": (kohya_name, "lora_down", "lora_up"),
    "LyCORIS": (lambda path: "lycoris_" + path.replace(".", "_"), "lora_down", "lora_up"),
    "several adapters' tools": (lambda path: f"diffusion_model.{path}", "lora_A.default", "lora_B.default"),
}


@pytest.mark.parametrize("family", IN_KOHYA)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layers_of_the_original_network_are_taken_apart(family, spelling, tmp_path):
    """Rows of B A are those of the layers in the order of the names' tables, which other tests hold to diffusers'."""
    spell, down, up = SPELLINGS[spelling]
    network = transformer(family)
    names, layers = names_of(family, network), layers_of(network)
    state = original_state(family, network, spell, down=down, up=up)
    got, expected = effects(read(save_state(state, tmp_path / "x.safetensors"), family, network)), {}
    for module in layers:
        original = names.original(module)
        stem = spell(original.path)
        rows = effect(state[f"{stem}.{down}.weight"], state[f"{stem}.{up}.weight"], 3 / 2)
        if original.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        lengths = [len(layers[other].weight) for other in original.modules]
        expected |= dict(zip(original.modules, rows.split(lengths), strict=True))
    assert_equal_effects(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spell",
    [
        lambda path: f"transformer.{path}",
        lambda path: f"diffusion_model.{path}",
        lambda path: f"transformer.base_model.model.{path}",
        lambda path: "lora_transformer_" + path.replace(".", "_"),
        lambda path: "lora_unet_" + path.replace(".", "_"),
        lambda path: "lycoris_" + path.replace(".", "_"),
        str,
    ],
    ids=["diffusers", "ai-toolkit", "peft", "OneTrainer", "musubi-tuner", "SimpleTuner", "bare"],
)
def test_layers_by_diffusers_paths_are_read(family, spell, tmp_path):
    network = transformer(family)
    factors = random_factors(layers_of(network), alpha=3)
    state = {f"{spell(module)}.alpha": torch.tensor(layer.alpha) for module, layer in factors.items()}
    for key, value in peft_state(factors).items():
        module, _, leaf = key.partition(".lora_")
        state[f"{spell(module)}.lora_{leaf}"] = value
    assert_same(read(save_state(state, tmp_path / "x.safetensors"), family, network), factors)


# diffusers' converters


@pytest.mark.parametrize(
    ("family", "where", "spelling"),
    [
        ("flux", "block", "sd-scripts"),
        ("flux2", "block", "sd-scripts"),
        ("flux2", "block", "ComfyUI"),
        ("flux2", "modulation", "ComfyUI"),
        ("qwen", "", "sd-scripts"),
        ("qwen", "", "ComfyUI"),
        ("z_image", "layers", "sd-scripts"),
        ("lumina2", "e", "ComfyUI"),
    ],
)
def test_a_file_of_the_original_network_is_read_as_diffusers_reads_it(family, where, spelling, tmp_path):
    """Without alphas where it takes no notice of them, and of Lumina 2 all layers of its blocks and no others."""
    spell, down, up = SPELLINGS[spelling]
    network = transformer(family, **FAMILIES[family].wide)
    alpha = 3.0 if spelling == "sd-scripts" else None
    state = original_state(family, network, spell, down=down, up=up, alpha=alpha, where=where)
    if family == "lumina2":
        state = {key: value for key, value in state.items() if "layers." in key or "refiner." in key}
    expected = diffusers_effects(lora_pipeline(family).lora_state_dict(dict(state)))
    assert expected
    assert_equal_effects(effects(read(save_state(state, tmp_path / "x.safetensors"), family, network)), expected)


# Parts and layers that are left out


def test_a_layer_of_a_joined_one_that_the_lora_does_not_change_has_none(tmp_path):
    network = transformer("flux")
    state = original_state("flux", network, kohya_name, where="single_transformer_blocks.0.attn")
    (up,) = (key for key in state if "lora_B" in key)
    state[up][16:32] = 0
    block = "single_transformer_blocks.0"
    found = read(save_state(state, tmp_path / "x.safetensors"), "flux", network)
    assert set(found) == {f"{block}.attn.to_q", f"{block}.attn.to_v", f"{block}.proj_mlp"}
    state[up][:] = 0  # of an untrained one all are kept
    found = read(save_state(state, tmp_path / "x.safetensors"), "flux", network)
    assert {layer.rank for layer in found.values()} == {2}
    assert len(found) == 4


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    ],
)
def test_text_encoders_are_left_out_where_that_is_wanted(key, tmp_path):
    network = transformer("sd3")
    factors = random_factors(layers_of(network))
    save_kohya(tmp_path / "own.safetensors", factors, names_of("sd3", network), title="x", prediction="epsilon")
    file = save_state(load_file(tmp_path / "own.safetensors") | {key: torch.ones(2, 8)}, tmp_path / "x.safetensors")
    with refused(str(file), key[:60], "--network_only"):
        read(file, "sd3", network)
    assert_same(read(file, "sd3", network, network_only=True), factors)
