"""`stepfuse set import` and `export` of LoRAs of a transformer."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepfuse.fuse.backbones.loading import layer_names, load_pipeline
from stepfuse.fuse.backbones.registry import BACKBONES
from stepfuse.fuse.lora.export import save_kohya, save_lora
from stepfuse.fuse.lora.factors import network_factors
from stepfuse.fuse.sets.adapter import read_factors
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.cli.main import main
from tests.fixtures_families import FAMILIES, save_family
from tests.fixtures_formats import assert_same
from tests.fixtures_transformers import layers_of, names_of, random_factors, transformer

TEXT = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_family("sd3", tmp_path_factory.mktemp("base") / "sd3")


@pytest.fixture(scope="module")
def factors(base):
    return random_factors(layers_of(load_pipeline(str(base)).transformer), alpha=3)


@pytest.fixture
def stranger(base, factors, tmp_path):
    """A file of kohya's layout, with a part of a text encoder."""
    file = tmp_path / "style.safetensors"
    save_kohya(file, factors, layer_names({"name_or_path": str(base)}), title="style", prediction="flow")
    save_file(load_file(file) | TEXT, file)
    return file


def run(*words):
    main([str(word) for word in words])


def imported(file, folder, base, *words):
    run("set", "import", file, "--objective", "style", "--eta", 1, "--set", folder, "--base", base, *words)


def complaint(*words):
    with pytest.raises(SystemExit) as error:
        imported(*words)
    return str(error.value.code)


@pytest.mark.parametrize("flag", ["--network_only", "--network-only", "--unet_only"])
def test_a_lora_goes_in_and_comes_out_in_every_format(base, factors, stranger, flag, tmp_path, capsys):
    told = complaint(stranger, tmp_path / "set", base)
    assert "--network_only" in told
    assert not (tmp_path / "set").exists()
    imported(stranger, tmp_path / "set", base, flag)
    (adapter,) = load_set(tmp_path / "set").adapters
    part, read = read_factors(adapter)
    assert part == "transformer"
    assert_same(read, factors)
    if flag != "--network_only":
        return

    for form in ("kohya", "diffusers"):
        run("set", "export", tmp_path / "set", "style", "--format", form, "--output", tmp_path / f"{form}.safetensors")
    run("set", "export", tmp_path / "set", "style", "--format", "peft", "--output", tmp_path / "peft")
    with safe_open(tmp_path / "kohya.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.architecture"].startswith("stable-diffusion-3-")
    theirs = load_file(stranger)
    own = load_file(tmp_path / "kohya.safetensors")
    assert own.keys() == theirs.keys() - TEXT.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())

    pipeline = load_pipeline(str(base))
    pipeline.load_lora_weights(tmp_path / "diffusers.safetensors", adapter_name="x")
    assert_same(network_factors(pipeline.transformer, "x"), factors)
    imported(tmp_path / "peft", tmp_path / "again", base)
    assert_same(read_factors(load_set(tmp_path / "again").adapters[0])[1], factors)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd3"])
def test_a_lora_of_each_family_goes_from_tool_to_tool(family, tmp_path, capsys):
    """Into a set as diffusers has it, out and in again as kohya's tools have it; SANA has no names there."""
    base = save_family(family, tmp_path / "base")
    network = load_pipeline(str(base)).transformer
    layers = {name: layer for name, layer in layers_of(network).items() if "conv_depth" not in name}
    factors = random_factors(layers, alpha=3)
    save_lora(tmp_path / "in.safetensors", factors, "transformer")
    imported(tmp_path / "in.safetensors", tmp_path / "set", base)
    export = ("set", "export", tmp_path / "set", "style", "--output", tmp_path / "kohya.safetensors")
    if family == "sana":
        with pytest.raises(SystemExit, match="has no name in kohya's files of SANA"):
            run(*export)
        assert not (tmp_path / "kohya.safetensors").exists()
        return
    run(*export)
    imported(tmp_path / "kohya.safetensors", tmp_path / "again", base)
    assert_same(read_factors(load_set(tmp_path / "again").adapters[0])[1], factors)


def test_every_family_has_a_name_for_users():
    config = {"num_layers": 1}
    unnamed = [name for name, family in BACKBONES.items() if not family.names(config).family]
    assert unnamed == []


def test_a_file_of_another_family_makes_no_set(base, tmp_path):
    network = transformer("flux")
    file = tmp_path / "x.safetensors"
    save_kohya(file, random_factors(layers_of(network)), names_of("flux", network), title="x", prediction="flow")
    told = complaint(file, tmp_path / "set", base)
    assert "this is a LoRA of FLUX.1 and the base is Stable Diffusion 3" in told
    assert not (tmp_path / "set").exists()
