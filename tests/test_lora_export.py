"""LoRAs in the layouts of diffusers, peft and kohya, held to those libraries and to lycoris."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepfuse.fuse.backbones.unet_names import UNetNames, sgm_path
from stepfuse.fuse.lora.config import METADATA
from stepfuse.fuse.lora.export import save_kohya
from stepfuse.fuse.lora.file import check_fits, open_lora
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.export import export as export_set
from tests.fixtures_formats import FACTORS_ALONE, assert_same, export, layers, peft_states, read_any_layout
from tests.fixtures_tiny import refused
from tests.fixtures_zoo import KINDS, assert_alike, predict

# peft 0.21 takes the bias of a factor B for a factor that lost a dimension.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape.*lora_B.bias")


@pytest.mark.parametrize(
    ("base", "form", "kind"),
    [("sd", form, kind) for form in ("diffusers", "peft") for kind in KINDS]
    + [(base, "kohya", kind) for base in ("sd", "xl") for kind in FACTORS_ALONE],
)
def test_an_exported_adapter_predicts_what_it_did(lora_bases, lora_adapters, base, form, kind, tmp_path):
    place = export(lora_adapters, base, kind, form, tmp_path / ("x" if form == "peft" else "x.safetensors"))
    pipeline = copy.deepcopy(lora_bases[base])
    if form == "peft":
        unet = PeftModel.from_pretrained(pipeline.unet, str(place))
    else:
        pipeline.load_lora_weights(place)
        unet = pipeline.unet
    assert_alike(predict(unet), predict(lora_adapters[base, kind][1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_set_loads_in_diffusers_and_by_its_header_in_peft(lora_bases, lora_adapters, kind):
    adapter, trained = lora_adapters["sd", kind]
    pipeline = copy.deepcopy(lora_bases["sd"])
    pipeline.load_lora_weights(adapter.folder)
    assert_alike(predict(pipeline.unet), predict(trained))
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA])
        state = {key.removeprefix("unet."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = convert_unet_state_dict_to_peft(state)
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in header.items()})
    unet = inject_adapter_in_model(config, copy.deepcopy(lora_bases["sd"].unet))
    assert not set_peft_model_state_dict(unet, state).unexpected_keys
    assert_alike(predict(unet), predict(trained))


@pytest.mark.parametrize(
    ("base", "form", "kind"),
    [("sd", form, kind) for form in ("diffusers", "peft") for kind in KINDS]
    + [(base, "kohya", kind) for base in ("sd", "xl") for kind in FACTORS_ALONE],
)
def test_what_was_written_is_read_back(lora_bases, lora_adapters, lora_factors, base, form, kind, tmp_path):
    place = export(lora_adapters, base, kind, form, tmp_path / ("x" if form == "peft" else "x.safetensors"))
    read = read_any_layout(place, lora_bases[base].unet, network_only=False)
    check_fits(place, read, lora_bases[base].unet)
    assert_same(read, lora_factors[base, kind])


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_those_of_peft(lora_adapters, kind, tmp_path):
    """rsLoRA's root goes into alpha: alpha / r = lora_alpha / √r."""
    trained = lora_adapters["sd", kind][1]
    state, metadata = peft_states(lora_adapters, "sd", kind)
    save_file(state, tmp_path / "x.safetensors", metadata)
    with open_lora(tmp_path / "x.safetensors", ["unet"]) as lora:
        scales = {name: layer.scaling for name, layer in lora.layers.items()}
    assert scales == pytest.approx({name: trained.get_submodule(name).scaling[kind] for name in scales}, rel=1e-6)


@pytest.mark.parametrize(("kind", "what"), [("dora", "DoRA"), ("with_bias", "bias")])
def test_what_kohyas_files_do_not_hold_is_refused(lora_adapters, kind, what, tmp_path):
    with refused(repr(kind), what, "diffusers or peft"):
        export(lora_adapters, "sd", kind, "kohya", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_format_is_refused(tmp_path):
    with refused("'onnx'", "kohya"):
        export_set("emoji", None, form="onnx", output=tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "prediction", "version", "second", "architecture"),
    [
        (dict(cross_attention_dim=768), "epsilon", "sd_v1", "False", "stable-diffusion-v1"),
        (dict(cross_attention_dim=768), "v_prediction", "sd_v1_v", "False", "stable-diffusion-v1"),
        (dict(cross_attention_dim=1024), "epsilon", "sd_v2", "True", "stable-diffusion-v2-512"),
        (dict(cross_attention_dim=1024), "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v"),
        (dict(addition_embed_type="text_time"), "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base"),
    ],
)
def test_a_kohya_file_says_what_it_is_of(lora_factors, config, prediction, version, second, architecture, tmp_path):
    """As sd-scripts does (library/train_util.py, sai_model_spec.py); diffusers refuses alphas beside peft's header."""
    own = {name: layer for name, layer in lora_factors["sd", "plain"].items() if "attentions" in name}
    save_kohya(
        tmp_path / "x.safetensors",
        own,
        UNetNames(config={"layers_per_block": 1} | config),
        title="x",
        prediction=prediction,
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    expected = dict(ss_base_model_version=version, ss_v2=second, ss_network_module="networks.lora")
    assert expected.items() <= metadata.items()
    assert (float(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"])) == (4, 3)
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert METADATA not in metadata


# Names, held to other libraries' tables


@pytest.fixture(scope="module")
def lycoris():
    """Its network for all layers of a UNet; by default it leaves out the first and last."""
    module = pytest.importorskip("lycoris.kohya")

    class Network(module.LycorisNetworkKohya):
        """Its presets are of the class."""

    Network.apply_preset({"unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]})
    return module, Network


def test_names_shapes_and_alphas_are_those_of_lycoris(lora_bases, lora_adapters, lycoris, tmp_path):
    _, network = lycoris
    unet = copy.deepcopy(lora_bases["sd"].unet)
    options = dict(lora_dim=4, alpha=3.0, conv_lora_dim=4, conv_alpha=3.0, network_module="lora")
    made = network(None, unet, warn_on_unmatched=False, **options)
    made.apply_to(None, None, False, True)
    expected = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    state = load_file(export(lora_adapters, "sd", "plain", "kohya", tmp_path / "x.safetensors"))
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert len(expected) == 3 * len(layers(lora_bases["sd"].unet))


@pytest.mark.parametrize("kind", ["plain", "patterns", "rank_stabilised_patterns"])
def test_lycoris_predicts_from_a_kohya_file_what_peft_does(lora_bases, lora_adapters, lycoris, kind, tmp_path):
    """Ranks and alphas of each layer's own too."""
    module, _ = lycoris
    file = export(lora_adapters, "sd", kind, "kohya", tmp_path / "x.safetensors")
    unet = copy.deepcopy(lora_bases["sd"].unet)
    network, _ = module.create_network_from_weights(1.0, str(file), None, None, unet)
    network.apply_to(None, unet, False, True)
    network.eval()
    assert_alike(predict(unet), predict(lora_adapters["sd", kind][1]))


SD15 = dict(attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
XL = dict(addition_embed_type="text_time", addition_time_embed_dim=256, use_linear_projection=True, sample_size=128)
SDXL = XL | dict(
    attention_head_dim=(5, 10, 20),
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    projection_class_embeddings_input_dim=2816,
    transformer_layers_per_block=(1, 2, 10),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)
REFINER = XL | dict(
    attention_head_dim=(6, 12, 24, 24),
    block_out_channels=(384, 768, 1536, 1536),
    cross_attention_dim=1280,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    projection_class_embeddings_input_dim=2560,
    transformer_layers_per_block=4,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)


def full_size(config):
    """A published UNet without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("config", [SDXL, REFINER, "xl"], ids=["sdxl", "refiner", "tiny"])
def test_diffusers_leads_each_name_of_stabilitys_unet_back_to_its_layer(lora_bases, config):
    """The checkpoint of that UNet, made of names alone, as diffusers reads one; of the norms only the last must be."""
    unet = lora_bases[config].unet if isinstance(config, str) else full_size(config)
    names = {f"{sgm_path(name, unet.config)}.weight": f"{name}.weight" for name in layers(unet)}
    names |= {key.replace(".weight", ".bias"): name.replace(".weight", ".bias") for key, name in names.items()}
    names |= {f"out.0.{leaf}": f"conv_norm_out.{leaf}" for leaf in ("weight", "bias")}
    checkpoint = {f"model.diffusion_model.{key}": name for key, name in names.items()}
    back = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {key for key, name in back.items() if key != name} == set()
    assert back.keys() == set(names.values())


def test_names_of_published_files(lora_bases):
    """As LoRAs for SDXL 1.0 have them; and no two layers share one."""
    published = {
        "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks_8_1_transformer_blocks_9_ff_net_2",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "middle_block_1_transformer_blocks_0_attn1_to_q",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    }
    unet = full_size(SDXL)
    assert published.keys() < set(layers(unet))
    for name, expected in published.items():
        assert UNetNames(config=unet.config).kohya(name) == f"lora_unet_{expected}"
    for unet in (full_size(SD15), full_size(SDXL), full_size(REFINER), lora_bases["sd"].unet, lora_bases["xl"].unet):
        names = [UNetNames(config=unet.config).kohya(name) for name in layers(unet)]
        assert len(set(names)) == len(names)


def test_levels_of_different_depths_are_numbered_through():
    """layers_per_block 1 and 2: blocks of input 1 to 2 and 3 to 4, of output 0 to 2 and 3 to 4."""
    config = {"layers_per_block": [1, 2], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    expected = {
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.1.conv1": "input_blocks.4.0.in_layers.2",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.resnets.1.conv1": "output_blocks.4.0.in_layers.2",
    }
    assert {name: sgm_path(name, config) for name in expected} == expected
