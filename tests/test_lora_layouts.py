"""Layouts of LoRA files: each is imported and predicts as the tool that writes it does, or is refused."""

import copy
import re

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from stepfuse.fuse.backbones.unet_names import UNetNames, sgm_path
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.export import save_lora
from stepfuse.fuse.lora.factors import put_on
from stepfuse.fuse.lora.file import check_fits, open_lora
from stepfuse.fuse.lora.keys import LayerTable, parse_key
from tests.fixtures_formats import assert_same, peft_states, read_any_layout
from tests.fixtures_tiny import refused
from tests.fixtures_zoo import FIRST, KINDS, LINEAR, assert_alike, lora, predict, randomise

# peft 0.21 takes the bias of a factor B for a factor that lost a dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape.*lora_B.bias")


def save(state, file, header=None):
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, file, metadata=header)
    return file


def imported(file, base, *, network_only=False):
    """What a set predicts that has the imported file."""
    factors = read_any_layout(file, base.unet, network_only=network_only)
    check_fits(file, factors, base.unet)
    written = file.parent / "written.safetensors"
    save_lora(written, factors, "unet")
    pipeline = copy.deepcopy(base)
    with open_lora(written, ["unet"]) as opened:
        put_on(pipeline.unet, "imported", written, opened.factors())
    return predict(pipeline.unet)


def renamed(state, pattern, by):
    return {re.sub(pattern, by, key): value for key, value in state.items()}


# diffusers


@pytest.mark.parametrize("kind", KINDS)
def test_todays_save_lora_adapter(lora_bases, lora_adapters, kind, tmp_path):
    """No prefix; peft's configuration in the header, without a prefix too."""
    _, unet = lora_adapters["sd", kind]
    copy.deepcopy(unet).save_lora_adapter(tmp_path, adapter_name=kind, weight_name="x.safetensors")
    assert_alike(imported(tmp_path / "x.safetensors", lora_bases["sd"]), predict(unet))


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("base", ["sd", "xl"])
def test_attention_processors_of_diffusers_before_peft(lora_bases, lora_factors, base, prefix, tmp_path):
    """`save_attn_procs` writes no prefix; alpha is the rank. Names by diffusers' own conversion of kohya's."""
    kohya = {}
    for name, layer in lora_factors[base, "plain"].items():
        if "attn" in name:
            stem = f"lora_unet_{name.replace('.', '_')}"
            kohya |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
    state, _ = _convert_non_diffusers_lora_to_diffusers(kohya)
    assert all(".processor.to_" in key for key in state)
    pipeline = copy.deepcopy(lora_bases[base])
    pipeline.load_lora_weights(dict(state))
    file = save(renamed(state, r"^unet\.", prefix), tmp_path / "x.safetensors")
    assert_alike(imported(file, lora_bases[base]), predict(pipeline.unet))


# peft


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "unet.base_model.model.", "_orig_mod.unet."])
def test_the_adapters_name_in_the_keys(lora_bases, lora_adapters, prefix, tmp_path):
    """`state_dict()` instead of peft's own function; the configuration in the header, or alpha is the rank."""
    _, unet = lora_adapters["sd", "plain"]
    state = {f"{prefix}{key}": value for key, value in unet.state_dict().items() if ".lora_" in key}
    assert f"{prefix}{FIRST}.lora_A.plain.weight" in state
    _, header = peft_states(lora_adapters, "sd", "plain")
    file = save(state, tmp_path / "x.safetensors", header)
    assert_alike(imported(file, lora_bases["sd"]), predict(unet))
    bare = read_any_layout(save(state, file), lora_bases["sd"].unet, network_only=False)
    assert {layer.scaling for layer in bare.values()} == {1}


def test_the_adapters_name_in_keys_of_a_dora(lora_bases, lora_adapters, tmp_path):
    _, unet = lora_adapters["sd", "dora"]
    state = {f"unet.{key}": value for key, value in unet.state_dict().items() if ".lora_" in key}
    assert any(key.endswith(".lora_magnitude_vector.dora.weight") for key in state)
    assert_alike(imported(save(state, tmp_path / "x.safetensors"), lora_bases["sd"]), predict(unet))


@pytest.fixture(scope="module")
def peft_model(lora_bases):
    """rsLoRA, with a rank and an alpha of some layers' own."""
    patterns = dict(rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 5})
    config = lora(lora_alpha=3, use_rslora=True, target_modules=[*LINEAR, "conv1"], **patterns)
    model = get_peft_model(copy.deepcopy(lora_bases["sd"].unet), config)
    randomise(model, 0)
    return model


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_pefts_wrapper_in_the_keys(lora_bases, peft_model, prefix, tmp_path):
    """The scale is in adapter_config.json, where that lies beside."""
    peft_model.save_pretrained(str(tmp_path))
    state = {prefix + key: value for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    file = save(state, tmp_path / "x.safetensors")
    assert_alike(imported(file, lora_bases["sd"]), predict(peft_model))
    (tmp_path / "adapter_config.json").unlink()
    if prefix:
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)
    else:  # as peft itself writes and reads them
        with refused("no adapter_config.json", "base_model.model."):
            read_any_layout(file, lora_bases["sd"].unet, network_only=False)


def test_names_of_layers_may_be_escaped_as_regular_expressions(lora_bases, tmp_path):
    patterns = {rf"^{re.escape(FIRST)}$": 2}
    config = lora(lora_alpha=3, target_modules=["to_q"], rank_pattern=patterns, alpha_pattern=patterns)
    model = get_peft_model(copy.deepcopy(lora_bases["sd"].unet), config)
    randomise(model, 0)
    model.save_pretrained(str(tmp_path))
    assert read_any_layout(tmp_path, lora_bases["sd"].unet, network_only=False)[FIRST].rank == 2
    assert_alike(imported(tmp_path / "adapter_model.safetensors", lora_bases["sd"]), predict(model))


def test_the_whole_state_of_a_peft_model_is_refused_for_the_weights_of_the_base(lora_bases, peft_model, tmp_path):
    file = save(peft_model.state_dict(), tmp_path / "x.safetensors")
    with refused(str(file), "base_layer", "the base itself"):
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)


def test_several_adapters_in_a_file_are_named(lora_bases, lora_adapters, tmp_path):
    state, _ = peft_states(lora_adapters, "sd", "rank_stabilised_patterns")
    both = renamed(state, r"\.weight$", ".first.weight") | renamed(state, r"\.weight$", ".second.weight")
    with refused("'first', 'second'", "separate file"):
        read_any_layout(save(both, tmp_path / "x.safetensors"), lora_bases["sd"].unet, network_only=False)


# kohya's factors and alphas under other names


def stated(factors, name, down="lora_down", up="lora_up", alpha="alpha"):
    state = {}
    for module, layer in factors.items():
        stem = name(module)
        state |= {f"{stem}.{down}.weight": layer.down, f"{stem}.{up}.weight": layer.up}
        state[f"{stem}.{alpha}"] = torch.tensor(layer.alpha)
    return state


NAMES = {
    "dotted": lambda path, config: f"unet.{path}",
    "dotted, no prefix": lambda path, config: path,
    "kohya": lambda path, config: "lora_unet_" + path.replace(".", "_"),
    "kohya, with dots": lambda path, config: f"lora_unet.{path}",
    "lycoris": lambda path, config: "lycoris_" + path.replace(".", "_"),
    "lycoris of a holder": lambda path, config: "lycoris_unet_" + path.replace(".", "_"),
    "sgm": lambda path, config: "lora_unet_" + sgm_path(path, config).replace(".", "_"),
    "diffusion_model": lambda path, config: f"diffusion_model.{sgm_path(path, config)}",
    "model.diffusion_model": lambda path, config: f"model.diffusion_model.{sgm_path(path, config)}",
    "diffusion_model of diffusers": lambda path, config: f"diffusion_model.{path}",
}


@pytest.mark.parametrize("base", ["sd", "xl"])
@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_of_a_layer_is_read(lora_bases, lora_factors, name, base, tmp_path):
    own, unet = lora_factors[base, "patterns"], lora_bases[base].unet
    state = stated(own, lambda path: NAMES[name](path, unet.config))
    assert_same(read_any_layout(save(state, tmp_path / "x.safetensors"), unet, network_only=False), own)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A", "lora_B"),
        ("lora.down", "lora.up"),
        ("lora_linear_layer.down", "lora_linear_layer.up"),
        ("lora_A.default", "lora_B.default"),
    ],
)
def test_every_spelling_of_a_factor_is_read(lora_bases, lora_factors, down, up, tmp_path):
    own = lora_factors["sd", "patterns"]
    for name in (lambda path: f"unet.{path}", lambda path: "lora_unet_" + path.replace(".", "_")):
        file = save(stated(own, name, down, up), tmp_path / "x.safetensors")
        assert_same(
            read_any_layout(file, lora_bases["sd"].unet, network_only=False),
            own,
        )
    if "default" not in down:
        flat = {f"lora_unet_{key.replace('.', '_')}": value for key, value in stated(own, str, down, up).items()}
        assert_same(
            read_any_layout(save(flat, file), lora_bases["sd"].unet, network_only=False),
            own,
        )


def test_layers_of_one_file_may_be_in_two_layouts(lora_bases, lora_factors, tmp_path):
    own = lora_factors["sd", "patterns"]
    attention = {name: layer for name, layer in own.items() if "attn" in name}
    others = {name: layer for name, layer in own.items() if "attn" not in name}
    state = stated(attention, lambda path: f"unet.{path}", "lora_A", "lora_B")
    state |= stated(others, lambda path: "lora_unet_" + path.replace(".", "_"))
    assert_same(
        read_any_layout(save(state, tmp_path / "x.safetensors"), lora_bases["sd"].unet, network_only=False),
        own,
    )


def test_an_alpha_and_a_configuration_must_agree(lora_bases, lora_adapters, lora_factors, tmp_path):
    own, header = lora_factors["sd", "patterns"], peft_states(lora_adapters, "sd", "patterns")[1]
    state = stated(own, lambda path: f"unet.{path}", "lora_A", "lora_B")
    file = save(state, tmp_path / "x.safetensors", header)
    assert_same(read_any_layout(file, lora_bases["sd"].unet, network_only=False), own)
    save(state | {f"unet.{FIRST}.alpha": torch.tensor(2.0)}, file, header)
    with refused(f"unet.{FIRST}.alpha", "alpha 2", "says 1"):
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)


# LyCORIS


@pytest.fixture
def lycoris(lora_bases):
    """A function that makes its network of some kind on a UNet, with random weights."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    kept = {name: value for name, value in vars(wrapper.LycorisNetwork).items() if name.isupper()}

    def make(unet, **options):
        wrapper.LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = wrapper.create_lycoris(unet, 1.0, linear_dim=4, linear_alpha=3, **options)
            network.apply_to()
            for name, value in network.named_parameters():
                if "lora_up" in name:
                    nn.init.normal_(value, std=0.1)
        return network.eval()

    yield make
    for name, value in kept.items():
        setattr(wrapper.LycorisNetwork, name, value)


@pytest.mark.parametrize("options", [{"algo": "lora"}, {"algo": "lora", "rs_lora": True, "conv_dim": 2}], ids=str)
@pytest.mark.parametrize("base", ["sd", "xl"])
def test_lycoris_plain_lora_predicts_as_it_does_there(lora_bases, lycoris, base, options, tmp_path):
    unet = copy.deepcopy(lora_bases[base].unet)
    network = lycoris(unet, **options)
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    assert all(key.startswith("lycoris_") for key in load_file(tmp_path / "x.safetensors"))
    expected = predict(unet)
    assert (expected - predict(lora_bases[base].unet)).abs().max() > 1e-2
    assert_alike(imported(tmp_path / "x.safetensors", lora_bases[base]), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algo": "loha"}, "LoHa"),
        ({"algo": "lokr"}, "LoKr"),
        ({"algo": "diag-oft"}, "OFT"),
        ({"algo": "boft"}, "OFT"),
        ({"algo": "glora"}, "GLoRA"),
        ({"algo": "full"}, "full weights"),
        ({"algo": "lora", "dora_wd": True}, "DoRA"),
        ({"algo": "lora", "use_tucker": True}, "Tucker"),
        ({"algo": "lora", "train_norm": True}, "normalisation"),
    ],
    ids=str,
)
def test_lycoris_other_kinds_are_refused_for_what_they_are(lora_bases, lycoris, options, reason, tmp_path):
    network = lycoris(copy.deepcopy(lora_bases["sd"].unet), **options)
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    with refused(str(tmp_path / "x.safetensors"), reason):
        read_any_layout(tmp_path / "x.safetensors", lora_bases["sd"].unet, network_only=False)


# Text encoders and embeddings


TEXTS = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": torch.ones(4, 8),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(()),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": torch.ones(4, 8),
    "text_encoders.0.layer.lora_A.default.weight": torch.ones(4, 8),
    "te.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": torch.ones(8, 4),
    "te1.text_model.encoder.layers.0.mlp.fc1.lora_up.weight": torch.ones(8, 4),
    "text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(4, 8),
    "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(4, 8),
    "lycoris_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8),
    "bundle_emb.style.string_to_param.*": torch.ones(2, 8),
    "bundle_emb.style.clip_l": torch.ones(2, 8),
    "bundle_emb.style.string_to_token.*": torch.ones(1, dtype=torch.int64),
    "clip_l": torch.ones(2, 8),
    "clip_g": torch.ones(2, 8),
    "text_encoders_0": torch.ones(2, 8),
}


@pytest.mark.parametrize("key", TEXTS)
def test_what_is_of_the_text_is_set_apart(lora_bases, lora_factors, key, tmp_path):
    own = lora_factors["sd", "rank_stabilised_patterns"]
    state = stated(own, lambda path: "lora_unet_" + path.replace(".", "_")) | {key: TEXTS[key]}
    file = save(state, tmp_path / "x.safetensors")
    with refused(str(file), key[:60], "--network_only"):
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)
    assert_same(read_any_layout(file, lora_bases["sd"].unet, network_only=True), own)


def test_the_configuration_of_a_text_encoder_does_not_matter_without_it(lora_bases, lora_factors, tmp_path):
    own = lora_factors["sd", "rank_stabilised_patterns"]
    state = stated(own, lambda path: f"unet.{path}") | {"text_encoder.x.lora_A.weight": torch.ones(4, 8)}
    file = save(state, tmp_path / "x.safetensors", {METADATA: '{"text_encoder.init_lora_weights": "pissa"}'})
    assert_same(read_any_layout(file, lora_bases["sd"].unet, network_only=True), own)


# Refusals


REFUSED = {
    f"unet.{FIRST}.dora_scale": ["DoRA in kohya's layout"],
    f"unet.{FIRST}.hada_w1_a": ["LoHa"],
    f"{FIRST}.lokr_w1": ["LoKr"],
    f"unet.{FIRST}.ia3_l": ["IA3"],
    f"base_model.model.{FIRST}.oft_r.default": ["OFT"],
    f"unet.{FIRST}.lora_embedding_A": ["embedding"],
    f"unet.{FIRST}.weight": ["full weights"],
    f"unet.{FIRST}.diff": ["full weights"],
    f"unet.{FIRST}.w_norm": ["normalisation"],
    f"unet.{FIRST}.scalar": ["setting"],
    f"unet.{FIRST}.base_layer.weight": ["the base itself"],
    f"unet.{FIRST.replace('to_q', 'processor')}.to_k_custom_diffusion.weight": ["Custom Diffusion"],
    "unet:0:up": ["cloneofsimo", "numbers layers"],
    "something": ["names no layer and factor"],
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ["another network than the base's"],
    "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight": ["another network than the base's"],
    "controlnet.conv_in.lora_A.weight": ["another network than the base's"],
    "unet.down_blocks.9.attentions.0.proj_in.lora_A.weight": ["no layer 'down_blocks.9.attentions.0.proj_in'"],
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ["no layer 'lora_unet_double_blocks_0_img_attn_qkv'"],
    "unet.conv_norm_out.lora_A.weight": ["conv_norm_out", "GroupNorm"],
    "lora_unet_conv_norm_out.lora_down.weight": ["conv_norm_out", "GroupNorm"],
    "unet.conv_in.alpha": ["conv_in", "alpha alone"],
    "unet.conv_in.lora_A.weight": ["conv_in", "lora_down alone"],
    "lora_unet_conv_in.lora_up.weight": ["lora_unet_conv_in", "lora_up alone"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_anything_else_is_refused_for_what_it_is(lora_bases, lora_factors, key, tmp_path):
    """The base is called another only where the layer is not in it; nobody is sent to the command that he runs."""
    own = {name: layer for name, layer in lora_factors["sd", "rank_stabilised_patterns"].items() if "to_k" in name}
    state = stated(own, lambda path: f"unet.{path}") | {key: torch.ones(4, 4)}
    file = save(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        read_any_layout(file, lora_bases["sd"].unet, network_only=False)
    told = str(error.value)
    assert told.startswith(str(file))
    assert all(reason in told for reason in REFUSED[key])
    assert ("another base" in told) == ("no layer" in told and "names no layer" not in told)
    assert "set import" not in told


def test_a_name_in_underscores_that_two_layers_have_is_refused():
    modules = {"block.to_q": nn.Linear(2, 2), "block_to.q": nn.Linear(2, 2), "block.k": nn.Linear(2, 2)}
    names = UNetNames(config={"layers_per_block": 1, "up_block_types": ()})
    table = LayerTable(modules, names)
    with refused("block.to_q", "block_to.q", "dots"):
        table.find(parse_key("lora_unet_block_to_q.lora_down.weight", names))
    assert table.find(parse_key("unet.block.to_q.lora_A.weight", names)) == "block.to_q"
    assert table.find(parse_key("lora_unet_block_k.lora_down.weight", names)) == "block.k"
