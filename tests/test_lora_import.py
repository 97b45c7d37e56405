"""LoRAs from elsewhere are read as those read them who wrote them, or refused."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import save_file

from stepfuse.fuse.backbones.unet_names import UNetNames
from stepfuse.fuse.lora.export import save_kohya, save_lora
from stepfuse.fuse.lora.file import check_fits, open_lora
from stepfuse.fuse.lora.merge import merge_factors
from tests.fixtures_formats import assert_same, export, peft_states, read_any_layout
from tests.fixtures_tiny import refused
from tests.fixtures_zoo import FIRST, assert_alike, predict

# peft 0.21 takes the bias of a factor B for a factor that lost a dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape.*lora_B.bias")


def kohya_state(lora_factors):
    """Made by hand, in diffusers' spelling."""
    state = {}
    for module, layer in lora_factors.items():
        name = "lora_unet_" + module.replace(".", "_")
        state |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


def save(state, file, **metadata):
    save_file({key: value.contiguous() for key, value in state.items()}, file, metadata=metadata or None)
    return file


def test_sdxl_in_diffusers_spelling_is_read_too(lora_bases, lora_factors, tmp_path):
    own = lora_factors["xl", "patterns"]
    file = save(kohya_state(own), tmp_path / "x.safetensors")
    assert_same(read_any_layout(file, lora_bases["xl"].unet, network_only=False), own)


@pytest.mark.parametrize("base", ["sd", "xl"])
def test_matrices_of_a_convolution_of_one_pixel_are_read_and_its_inverse(lora_bases, lora_factors, base, tmp_path):
    """proj_in is a convolution in the one base and linear in the other."""
    own = {n: layer for n, layer in lora_factors[base, "plain"].items() if n.endswith(("proj_in", "conv_shortcut"))}
    assert {layer.down.ndim for layer in own.values()} == ({4} if base == "sd" else {2, 4})
    other = {
        k: v.flatten(1) if v.ndim == 4 else v if v.ndim < 2 else v[..., None, None] for k, v in kohya_state(own).items()
    }
    assert_same(
        read_any_layout(save(other, tmp_path / "x.safetensors"), lora_bases[base].unet, network_only=False),
        own,
    )


def test_matrices_of_a_convolution_of_any_size_are_read(lora_bases, lora_factors, tmp_path):
    own = lora_factors["sd", "patterns"]
    assert any(layer.down.shape[2:] == (3, 3) for layer in own.values())
    flat = {key: value.flatten(1) if value.ndim == 4 else value for key, value in kohya_state(own).items()}
    assert_same(
        read_any_layout(save(flat, tmp_path / "x.safetensors"), lora_bases["sd"].unet, network_only=False),
        own,
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_read_with_its_values(lora_bases, lora_factors, dtype, tmp_path):
    """sd-scripts, and tools that shrink files, write it."""
    state = {key: value.to(dtype) for key, value in kohya_state(lora_factors["sd", "plain"]).items()}
    read = read_any_layout(save(state, tmp_path / "x.safetensors"), lora_bases["sd"].unet, network_only=False)
    for module, layer in read.items():
        name = "lora_unet_" + module.replace(".", "_")
        assert torch.equal(layer.down.float(), state[f"{name}.lora_down.weight"].float())
        assert torch.equal(layer.up.float(), state[f"{name}.lora_up.weight"].float())
        assert layer.alpha == float(state[f"{name}.alpha"])
    save_lora(tmp_path / "written.safetensors", read, "unet")
    with open_lora(tmp_path / "written.safetensors", ["unet"]) as written:
        assert written.as_written


def test_the_only_file_of_a_folder_is_taken_and_of_several_one_must_be_chosen(lora_bases, lora_factors, tmp_path):
    own, unet = lora_factors["sd", "patterns"], lora_bases["sd"].unet
    save(kohya_state(own), tmp_path / "style.safetensors")
    assert_same(read_any_layout(tmp_path, unet, network_only=False), own)
    (tmp_path / "unet").mkdir()
    (tmp_path / "style.safetensors").rename(tmp_path / "unet" / "style.safetensors")
    save(kohya_state(own), tmp_path / ".other.safetensors")
    assert_same(read_any_layout(tmp_path, unet, network_only=False), own)
    save(kohya_state(own), tmp_path / "style-000002.safetensors")
    with refused(str(tmp_path), "style-000002.safetensors", "unet/style.safetensors", "--weight_name"):
        read_any_layout(tmp_path, unet, network_only=False)


@pytest.mark.parametrize("files", [["pytorch_lora_weights.bin"], ["adapter_config.json", "adapter_model.bin"]], ids=str)
def test_a_folder_of_a_pickle_is_refused_for_it(lora_bases, files, tmp_path):
    for file in files:
        (tmp_path / file).write_text("{}")
    with refused(str(tmp_path / files[-1]), "pickle"):
        read_any_layout(tmp_path, lora_bases["sd"].unet, network_only=False)


def test_without_an_alpha_it_is_the_rank(lora_bases, lora_factors, tmp_path):
    state = {k: v for k, v in kohya_state(lora_factors["sd", "patterns"]).items() if not k.endswith(".alpha")}
    read = read_any_layout(save(state, tmp_path / "x.safetensors"), lora_bases["sd"].unet, network_only=False)
    assert {name: (layer.alpha, layer.scaling) for name, layer in read.items()} == {
        name: (layer.rank, 1) for name, layer in lora_factors["sd", "patterns"].items()
    }


def test_alphas_that_are_whole_numbers_are_read(lora_bases, lora_adapters, lora_factors, tmp_path):
    """Those of diffusers' own conversion, which are the ranks; and what was merged or came without, once exported."""
    state, _ = peft_states(lora_adapters, "sd", "patterns")
    file = save(convert_state_dict_to_kohya(state), tmp_path / "x.safetensors")
    ranks = {name: replace(layer, alpha=layer.rank) for name, layer in lora_factors["sd", "patterns"].items()}
    read = read_any_layout(file, lora_bases["sd"].unet, network_only=False)
    assert_same(read, ranks)
    for own in (ranks, merge_factors([("plain", 0.5, lora_factors["sd", "plain"])])[0]):
        save_kohya(file, own, UNetNames(config=lora_bases["sd"].unet.config), title="x", prediction="epsilon")
        assert_same(
            read_any_layout(file, lora_bases["sd"].unet, network_only=False),
            own,
        )


@pytest.mark.parametrize("kind", ["rank_stabilised_patterns", "dora", "patterns"])
def test_files_of_diffusers_scripts_are_read_with_their_header(lora_bases, lora_adapters, lora_factors, kind, tmp_path):
    """Attention under older names, peft's configuration beside them."""
    _, trained = lora_adapters["sd", kind]
    state, header = peft_states(lora_adapters, "sd", kind)
    state = convert_state_dict_to_diffusers(state)
    assert f"unet.{FIRST}.lora.down.weight" in state
    place = save(state, tmp_path / "x.safetensors", **header)
    if kind == "rank_stabilised_patterns":  # of others than attention diffusers 0.42 drops some
        pipeline = copy.deepcopy(lora_bases["sd"])
        pipeline.load_lora_weights(place)
        assert_alike(predict(pipeline.unet), predict(trained))
    assert_same(
        read_any_layout(place, lora_bases["sd"].unet, network_only=False),
        lora_factors["sd", kind],
    )


@pytest.mark.parametrize("base", ["sd", "xl"])
def test_layouts_before_peft_are_read_as_diffusers_reads_them(lora_bases, lora_factors, base, tmp_path):
    """Attention under its processor, which diffusers itself makes of kohya's names; its scale is 1."""
    own = {
        name: replace(layer, alpha=layer.rank)
        for name, layer in lora_factors[base, "plain"].items()
        if "add" not in name
    }
    state, _ = _convert_non_diffusers_lora_to_diffusers(kohya_state(own))
    assert f"unet.{FIRST.replace('.to_q', '.processor.to_q_lora')}.down.weight" in state
    file = save(state, tmp_path / "x.safetensors")
    read = read_any_layout(file, lora_bases[base].unet, network_only=False)
    assert_same(read, own)
    pipeline = copy.deepcopy(lora_bases[base])
    pipeline.load_lora_weights(file)
    again = copy.deepcopy(lora_bases[base])
    save_lora(tmp_path / "again.safetensors", read, "unet")
    again.load_lora_weights(tmp_path / "again.safetensors")
    assert_alike(predict(again.unet), predict(pipeline.unet))


def test_a_text_encoder_is_left_out_where_that_is_wanted(lora_bases, lora_factors, tmp_path):
    own = lora_factors["sd", "plain"]
    text = {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8) for i in ("", 1, 2)}
    for key, value in text.items():
        file = save(kohya_state(own) | {key: value}, tmp_path / "x.safetensors")
        with refused(str(file), key, "text_encoder", "--network_only"):
            read_any_layout(file, lora_bases["sd"].unet, network_only=False)
        assert_same(
            read_any_layout(file, lora_bases["sd"].unet, network_only=True),
            own,
        )
    with refused(str(file), "no layers of the network"):
        read_any_layout(save(text, file), lora_bases["sd"].unet, network_only=True)


NAME = "lora_unet_" + FIRST.replace(".", "_")


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        ({"lora_unet_down_blocks_9_conv.alpha": torch.ones(())}, ["no layer", "'lora_unet_down_blocks_9_conv'"]),
        ({f"{NAME}.lora_up.weight": None}, [NAME, "lora_down alone"]),
        ({f"{NAME}.lora_down.weight": None}, [NAME, "lora_up alone"]),
        ({f"{NAME}.dora_scale": torch.ones(32, 1)}, [f"{NAME}.dora_scale", "DoRA"]),
        ({f"{NAME}.hada_w1_a": torch.ones(32, 4)}, [f"{NAME}.hada_w1_a", "LoHa"]),
        ({f"{NAME}.lora_mid.weight": torch.ones(4, 4)}, [f"{NAME}.lora_mid", "Tucker"]),
        (
            {f"unet.{FIRST}.lora_A.weight": torch.ones(4, 32)},
            [f"unet.{FIRST}.lora_A", NAME, "same factor"],
        ),
        ({f"{NAME}.lora_down.weight": torch.ones(4, 31)}, [FIRST, "[32, 31]", "[32, 32]", "another base"]),
        ({f"{NAME}.lora_down.weight": torch.ones(4, 32).int()}, [f"{NAME}.lora_down", "I32"]),
    ],
    ids=lambda value: next(iter(value)).rpartition(NAME)[2] if isinstance(value, dict) else "",
)
def test_a_kohya_file_that_makes_no_lora_of_the_base_is_refused(lora_bases, lora_factors, changes, culprits, tmp_path):
    state = {k: v for k, v in (kohya_state(lora_factors["sd", "plain"]) | changes).items() if v is not None}
    file = save(state, tmp_path / "x.safetensors")
    with refused(str(file), *culprits):
        check_fits(
            file,
            read_any_layout(file, lora_bases["sd"].unet, network_only=False),
            lora_bases["sd"].unet,
        )


MALFORMED = {
    "a block": {f"{NAME.rpartition('_attn1')[0]}.lora_{what}.weight": torch.ones(4, 4) for what in ("down", "up")},
    "two alphas": {f"{NAME}.alpha": torch.ones(2)},
    "an alpha that is no number": {f"{NAME}.alpha": torch.tensor(math.nan)},
    "an alpha of 0": {f"{NAME}.alpha": torch.zeros(())},
    "ranks that differ": {f"{NAME}.lora_up.weight": torch.ones(32, 3)},
    "no dimensions": {f"{NAME}.lora_{what}.weight": torch.ones(()) for what in ("down", "up")},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_kohya_file_of_malformed_layers_is_refused(lora_bases, lora_factors, what, tmp_path):
    file = save(kohya_state(lora_factors["sd", "plain"]) | MALFORMED[what], tmp_path / "x.safetensors")
    with refused(str(file), FIRST if "alpha" not in what and what != "a block" else next(iter(MALFORMED[what]))):
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)


@pytest.mark.parametrize("form", ["diffusers before peft", "peft"])
def test_what_is_wrong_names_the_file_it_is_wrong_in(lora_bases, lora_adapters, form, tmp_path):
    state, _ = peft_states(lora_adapters, "sd", "plain")
    if form == "peft":
        file = export(lora_adapters, "sd", "plain", "peft", tmp_path / "x") / "adapter_model.safetensors"
        save({k.replace("unet.", "base_model.model."): v for k, v in state.items() if "lora_B" not in k}, file)
    else:
        file = save(
            {k.replace("lora_A", "hada_w1_a"): v for k, v in state.items() if "lora_A" in k}, tmp_path / "x.safetensors"
        )
    with refused(str(file)):
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)


def test_a_lora_of_another_base_is_refused(lora_bases, lora_adapters, lora_factors, tmp_path):
    """SDXL's has layers that SD has not, and such as have other shapes there."""
    folder = lora_adapters["xl", "plain"][0].folder
    for some, culprit in (("add_embedding", "no layer 'add_embedding.linear_1'"), ("attentions", "another base")):
        own = {name: layer for name, layer in lora_factors["xl", "plain"].items() if some in name}
        with refused(str(folder), culprit):
            check_fits(folder, own, lora_bases["sd"].unet)


def test_pickles_and_what_is_not_there_are_named(lora_bases, tmp_path):
    for name in ("pytorch_lora_weights.bin", "x.pt", "x.CKPT"):
        (tmp_path / name).write_bytes(b"")
        with refused(str(tmp_path / name), "pickle", "safetensors"):
            read_any_layout(tmp_path / name, lora_bases["sd"].unet, network_only=False)
    (tmp_path / "pytorch_lora_weights.bin").unlink()
    for place in (tmp_path, tmp_path / "x.safetensors"):
        with refused(str(place), "no LoRA weights"):
            read_any_layout(place, lora_bases["sd"].unet, network_only=False)


def test_a_file_of_peft_without_its_configuration_is_refused(lora_bases, lora_adapters, tmp_path):
    folder = export(lora_adapters, "sd", "plain", "peft", tmp_path / "x")
    (folder / "adapter_config.json").unlink()
    with refused("no adapter_config.json", str(folder)):
        read_any_layout(folder / "adapter_model.safetensors", lora_bases["sd"].unet, network_only=False)
