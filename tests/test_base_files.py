"""Files of a base's weights: variants, pickles, and weights that are missing."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepfuse.fuse.backbones.loading import load_pipeline
from tests.fixtures_tiny import refused, save_stable_diffusion, save_stable_diffusion_xl

# Variants of weight files


def test_the_only_variant_is_found_and_remembered(tmp_path, caplog):
    base = save_stable_diffusion(tmp_path / "base", variant="fp16")
    with caplog.at_level(logging.WARNING, logger="stepfuse"):
        pipeline = load_pipeline(str(base), safe=True)
    assert "fp16" in caplog.text
    assert torch.equal(pipeline.unet.conv_in.weight, load_pipeline(str(base), variant="fp16").unet.conv_in.weight)
    with refused("'bf16'", "fp16"):
        load_pipeline(str(base), variant="bf16")


def test_of_several_variants_one_must_be_chosen(tmp_path):
    base = save_stable_diffusion(tmp_path / "base", variant="fp16")
    for file in base.glob("*/*.fp16.safetensors"):
        (file.parent / file.name.replace("fp16", "ema")).write_bytes(file.read_bytes())
    with refused("ema and fp16", "variant"):
        load_pipeline(str(base))
    assert load_pipeline(str(base), variant="ema").unet.dtype == torch.float32


def test_parts_without_the_variant_are_loaded_as_they_are(tmp_path):
    base = save_stable_diffusion(tmp_path / "base")
    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    load_pipeline(str(base), safe=True)
    unet.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with refused(str(base), "unet"):
        load_pipeline(str(base), safe=True)


def test_weights_that_are_pickles_are_named_with_the_remedy(tmp_path):
    pipeline = load_pipeline(str(save_stable_diffusion(tmp_path / "base")))
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    base = str(tmp_path / "pickled")
    with refused(repr(base), "unet", "vae", ".bin", "save_pretrained"):
        load_pipeline(base, safe=True)
    assert torch.equal(load_pipeline(base).unet.conv_in.weight, pipeline.unet.conv_in.weight)


# Weights that are missing


@pytest.mark.parametrize(
    ("component", "weight"),
    [
        ("unet", "conv_in.weight"),
        ("vae", "decoder.layers.0.weight"),
        ("text_encoder", "final_layer_norm.weight"),
        ("text_encoder_2", "text_projection.weight"),
    ],
)
def test_a_base_without_some_of_its_weights_is_refused(tmp_path, component, weight):
    base = save_stable_diffusion_xl(tmp_path / "base")
    (file,) = (base / component).glob("*.safetensors")
    state = load_file(file)
    (key,) = [key for key in state if key.removeprefix("text_model.") == weight]
    del state[key]
    save_file(state, file, metadata={"format": "pt"})
    with refused(repr(str(base)), component, weight, f"{len(state)} of {len(state) + 1}"):
        load_pipeline(str(base))


def test_text_encoders_saved_by_transformers_4_have_all_their_weights(tmp_path):
    base = save_stable_diffusion(tmp_path / "base")
    expected = load_pipeline(str(base)).text_encoder.state_dict()
    file = base / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    got = load_pipeline(str(base)).text_encoder.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
