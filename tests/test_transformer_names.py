"""Names of transformers' layers in other tools' files, held to diffusers' converters."""

from dataclasses import replace

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file

from stepfuse.fuse.lora.export import save_kohya, save_lora
from stepfuse.fuse.lora.factors import network_factors, put_on
from tests.fixtures_formats import assert_same
from tests.fixtures_tiny import refused
from tests.fixtures_transformers import (
    FAMILIES,
    IN_KOHYA,
    assert_equal_effects,
    diffusers_effects,
    effect,
    effects,
    layers_of,
    lora_pipeline,
    names_of,
    published,
    random_factors,
    transformer,
)

MODELS = [(family, model) for family in IN_KOHYA for model in FAMILIES[family].published]


def save(network, family, file, **options):
    """A LoRA of every layer of a network in kohya's layout, and its factors."""
    factors = random_factors(layers_of(network), **options)
    save_kohya(file, factors, names_of(family, network), title="x", prediction="flow_prediction")
    return factors


# Every layer


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_every_layer_of_a_published_model_has_a_name_of_its_own(family, model):
    """Rows of a layer that several are in follow one another, as many as the layers have."""
    network = published(family, model)
    names, layers = names_of(family, network), layers_of(network)
    originals = {module: names.in_kohya(module) for module in layers}
    for module, original in originals.items():
        assert module in original.modules
        assert {originals[other] for other in original.modules} == {original}
        if len(original.modules) > 1:
            assert original.rows == tuple(len(layers[other].weight) for other in original.modules)
    paths = {original.path for original in originals.values()}
    assert len(paths) == len({path.replace(".", "_") for path in paths})
    assert len(paths) == len(layers) - sum(len(o.modules) - 1 for o in set(originals.values()))
    for path in paths & layers.keys():  # the same name is the same layer
        assert path in originals[path].modules


SHAPES = {  # of layers in the published files of the original networks
    ("sd3", "3.5 medium"): {
        "joint_blocks.0.x_block.attn.qkv": 4608,
        "joint_blocks.12.x_block.attn2.qkv": 4608,
        "joint_blocks.0.x_block.adaLN_modulation.1": 13824,
        "joint_blocks.23.context_block.adaLN_modulation.1": 3072,
        "final_layer.adaLN_modulation.1": 3072,
    },
    ("flux", "dev"): {"double_blocks.18.txt_attn.qkv": 9216, "single_blocks.37.linear1": 21504},
    ("flux2", "klein 4B"): {"single_blocks.19.linear1": 27648, "double_stream_modulation_img.lin": 18432},
    ("z_image", "Z-Image"): {"layers.29.attention.qkv": 11520, "x_embedder": 3840},
    ("lumina2", "Lumina-Image 2.0"): {"layers.25.attention.qkv": 3840, "noise_refiner.1.feed_forward.w3": 9216},
}


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_layers_have_the_rows_of_the_published_files(case):
    network = published(*case)
    names, layers = names_of(case[0], network), layers_of(network)
    rows = dict.fromkeys(SHAPES[case], 0)
    for module, layer in layers.items():
        path = names.in_kohya(module).path
        if path in rows:
            rows[path] += len(layer.weight)
    assert rows == SHAPES[case]


# diffusers' converters of whole checkpoints


class Checkpoint(dict):
    """Rows of the layers; what else a converter asks for, biases and norms, is six zeros."""

    def pop(self, key, default=None):
        return super().pop(key, torch.zeros(6, 6) if default is None else default)


CONVERTERS = {
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "z_image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_converter_of_checkpoints_leads_every_row_back_to_its_layer(family, tmp_path):
    """It takes a checkpoint of the original network apart by rows: here those of B in a file of kohya's layout."""
    network = transformer(family, **FAMILIES[family].wide)
    names = names_of(family, network)
    factors = save(network, family, tmp_path / "x.safetensors", alpha=3)
    state = load_file(tmp_path / "x.safetensors")
    paths = {names.kohya(module): names.in_kohya(module).path for module in factors}
    checkpoint = Checkpoint({f"{path}.weight": state[f"{name}.lora_up.weight"] for name, path in paths.items()})
    if family == "flux":  # which splits biases by the published width
        checkpoint |= {"single_blocks.0.linear1.bias": torch.zeros(7 * 3072)}
    converted = getattr(single_file_utils, CONVERTERS[family])(checkpoint)
    got = {}
    for module in factors:
        name = names.kohya(module)
        down = state[f"{name}.lora_down.weight"]
        assert float(state[f"{name}.alpha"]) == len(down)
        got[module] = effect(down, converted[f"{module}.weight"])
    assert_equal_effects(got, effects(factors))


# diffusers' converters of LoRAs

# What diffusers 0.42 leaves out of a file of kohya's layout, or misnames so that it is loaded nowhere.
LEFT_OUT = {
    "flux2": ["guidance_embedder", "stream_modulation", "norm_out"],
    "z_image": ["all_final_layer", "all_x_embedder"],
}


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen", "z_image"])
def test_diffusers_reads_a_kohya_export_as_it_was(family, tmp_path):
    network = transformer(family, **FAMILIES[family].wide)
    factors = save(network, family, tmp_path / "x.safetensors", alpha=3)
    expected = effects(factors)
    for part in LEFT_OUT.get(family, []):
        expected = {module: value for module, value in expected.items() if part not in module}
    state = lora_pipeline(family).lora_state_dict(load_file(tmp_path / "x.safetensors"))
    got = diffusers_effects(state)
    assert_equal_effects({module: value for module, value in got.items() if module in factors}, expected)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen"])
def test_where_factors_are_not_shared_they_come_back_bit_for_bit(family, tmp_path):
    network = transformer(family, **FAMILIES[family].wide)
    factors = save(network, family, tmp_path / "x.safetensors")
    state = lora_pipeline(family).lora_state_dict(load_file(tmp_path / "x.safetensors"))
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    for key, value in state.items():
        module, _, kind = key.partition(".lora_")
        assert torch.equal(value, factors[module].down if kind == "A.weight" else factors[module].up)


# A set's file in diffusers


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_of_an_adapter_loads_in_diffusers_as_it_loads_here(family, dora, tmp_path):
    """But for the magnitude of FLUX.2's `attn.to_out`, which diffusers 0.42 takes for that of `attn.to_out.0`."""
    ours = transformer(family, device="cpu")
    layers = {name: layer for name, layer in layers_of(ours).items() if "conv_depth" not in name}
    factors = random_factors(layers, alpha=3)
    if dora:
        factors = {
            name: replace(layer, magnitude=torch.rand(len(layer.up)))
            for name, layer in factors.items()
            if layer.up.ndim == 2 and not name.endswith("to_out")
        }
    put_on(ours, "x", tmp_path, factors)
    save_lora(tmp_path / "x.safetensors", factors, "transformer")
    theirs = transformer(family, device="cpu")
    pipeline = lora_pipeline(family)
    more = {"return_alphas": True} if family == "flux" else {}
    state, *alphas, metadata = pipeline.lora_state_dict(tmp_path / "x.safetensors", return_lora_metadata=True, **more)
    given = {"network_alphas": alphas[0]} if alphas else {}
    pipeline.load_lora_into_transformer(state, transformer=theirs, adapter_name="x", metadata=metadata, **given)
    assert_same(network_factors(theirs, "x"), network_factors(ours, "x"))


# Metadata and refusals


@pytest.mark.parametrize(
    ("family", "model", "version", "architecture"),
    [
        ("sd3", "3 medium", "medium", "stable-diffusion-3-medium"),
        ("sd3", "3.5 medium", "5-medium", "stable-diffusion-3-5-medium"),
        ("sd3", "3.5 large", "5-large", "stable-diffusion-3-5-large"),
        ("flux", "dev", "flux1", "flux-1-dev"),
        ("flux", "schnell", "flux1", "flux-1-schnell"),
        ("flux2", "klein 4B", "flux2", "Flux.2-klein-4b"),
        ("flux2", "klein 9B", "flux2", "Flux.2-klein-9b"),
        ("flux2", "dev", "flux2", "Flux.2-dev"),
        ("qwen", "Qwen-Image", "qwen_image", "Qwen-Image"),
        ("z_image", "Z-Image", "z_image", "Z-Image"),
        ("lumina2", "Lumina-Image 2.0", "lumina2", "lumina-2"),
    ],
)
def test_a_kohya_file_says_what_it_is_of(family, model, version, architecture, tmp_path):
    """As sd-scripts and musubi-tuner do (library/sai_model_spec.py, utils/sai_model_spec.py)."""
    config = FAMILIES[family].published[model]
    if family == "flux2":
        config = {"num_attention_heads": 48} | config
    made = FAMILIES[family].names(config=config)
    metadata = made.kohya_metadata(title="x", rank=4, alpha=4.0, prediction="flow_prediction")
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_network_module"].startswith("networks.lora_")
    network = transformer(family)
    save(network, family, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"


def test_a_layer_without_a_name_is_refused_by_name(tmp_path):
    network = transformer("sana")
    with refused("'patch_embed.proj'", "SANA", "diffusers' format"):
        save(network, "sana", tmp_path / "x.safetensors")
    network = transformer("sd3")
    with refused("'transformer_blocks.0.extra'", "Stable Diffusion 3"):
        names_of("sd3", network).kohya("transformer_blocks.0.extra")
    assert not list(tmp_path.iterdir())
