"""The bundled bases are saved so that transformers 4 and 5 read all of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from stepfuse.data import emoji
from stepfuse.scripts.emoji.build_base import prefix_text_encoder
from tests.fixtures_tiny import text_config

ROOT = Path(__file__).parents[1]
TEXT_ENCODERS = {  # and the number of their tensors: 2 + 16 a layer + 2, and the projection
    emoji.PIPELINE / "text_encoder": 36,
    emoji.FLOW / "text_encoder": 37,
    emoji.FLOW / "text_encoder_2": 53,
}
PARTS = ("text_model.embeddings.", "text_model.encoder.", "text_model.final_", "text_projection.")


@pytest.mark.parametrize("folder", TEXT_ENCODERS)
def test_the_text_encoders_tensors_are_named_as_transformers_4_names_them(folder):
    """4.55 gives a model of random weights for the names without `text_model.`, which 5 writes; 5 reads both."""
    state = load_file(folder / "model.safetensors")
    assert len(state) == TEXT_ENCODERS[folder]
    assert all(key.startswith(PARTS) for key in state)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        (CLIPTextModel, emoji.PIPELINE / "text_encoder"),
        (CLIPModel, emoji.CLIP),
        (CLIPTextModelWithProjection, emoji.FLOW / "text_encoder"),
        (CLIPTextModelWithProjection, emoji.FLOW / "text_encoder_2"),
    ],
)
def test_every_tensor_is_loaded(model, folder):
    loaded, report = model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    values = load_file(folder / "model.safetensors")
    read = {name.removeprefix("text_model."): value for name, value in loaded.state_dict().items()}
    assert len(read) == len(values)
    for name, value in values.items():
        assert torch.equal(read[name.removeprefix("text_model.")], value), name


def test_the_build_names_them_so(tmp_path):
    model = CLIPTextModel(text_config()).eval()
    model.save_pretrained(tmp_path)
    for _ in range(2):  # the second time it is named so already
        prefix_text_encoder(tmp_path / "model.safetensors")
    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "model.safetensors"))
    ids = torch.tensor([[0, 7, 9, 1]])
    again = CLIPTextModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, rtol=0, atol=0)


def test_the_page_of_base_models_has_what_was_measured_of_both_bases():
    measured = [json.loads((ROOT / f"docs/bundled-bases/{name}.json").read_text()) for name in ("emoji-flow", "emoji")]
    assert all(figures["pairs"] == 256 and figures["choices"] == 32 and figures["steps"] == 20 for figures in measured)
    assert measured[0]["sampled"] >= 0.7
    text = (ROOT / "docs/base-models.md").read_text()
    for head, key, form in (("sharpness", "gradient_energy", "{:.4f}"), ("CLIP distance", "clip_distance", "{:.3f}")):
        values = [*(figures[key]["sampled"] for figures in measured), measured[0][key]["real"]]
        cells = [form.format(value) for value in values]
        assert any(line.startswith(f"| {head}") and cells == line[2:-2].split(" | ")[1:] for line in text.splitlines())
    kept = [f"{figures['gradient_energy']['reconstructed']:.4f}" for figures in measured]
    assert f"| the same of real images after the autoencoder | {kept[0]} | {kept[1]} | |" in text
    unguided = json.loads((ROOT / "docs/bundled-bases/emoji-flow-unguided.json").read_text())
    assert unguided["guidance_scale"] == 1.0
    assert (
        f"with a guidance scale of 1 the images of `emoji-flow` have {unguided['gradient_energy']['sampled']:.4f}"
        in re.sub(r"\s+", " ", text)
    )
    ranks = [f"{100 * value:.1f} %" for value in (*(figures["sampled"] for figures in measured), measured[0]["real"])]
    assert f"| {' | '.join(ranks)} |" in text


def test_the_page_of_base_models_shows_how_visible_rewards_are():
    measured = json.loads((ROOT / "docs/bundled-bases/visible-rewards.json").read_text())
    text = (ROOT / "docs/base-models.md").read_text()
    assert f"{measured['steps']} steps of step-level DPO" in text
    assert f"{measured['prompts']} held-out prompts" in text
    lines = [line for line in text.splitlines() if re.search(r"^\| `\w+` \| [+−]", line)]
    differences = []
    for line in lines:
        name, gain, deviations, difference, _ = line.strip("| ").split(" | ")
        row = measured["rewards"][name.strip("`")]
        differences.append(row["colour_difference"]["mean"])
        decimals = len(gain.split()[0].partition(".")[2])
        ends = (f"{row['gain'][end]:+.{decimals}f}".replace("-", "−") for end in ("mean", "low", "high"))
        assert gain == "{} [{}, {}] ".format(*ends) + row["unit"]
        assert float(deviations) == pytest.approx(row["gain_in_deviations"], abs=0.005)
        ends = (f"{row['colour_difference'][end]:.1f}" for end in ("mean", "low", "high"))
        assert difference == "{} [{}, {}]".format(*ends)
    assert len(lines) == len(measured["rewards"])
    assert differences == sorted(differences, reverse=True)
