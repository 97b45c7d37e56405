"""The embedded base is saved so that transformers 4 and 5 read all of it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel

from stepfuse.data import emoji
from stepfuse.scripts.emoji.build_base import prefix_text_encoder
from tests.fixtures_tiny import text_config

TEXT_ENCODER = emoji.PIPELINE / "text_encoder"


def test_the_text_encoders_tensors_are_named_as_transformers_4_names_them():
    """4.55 gives a model of random weights for the names without `text_model.`, which 5 writes; 5 reads both."""
    state = load_file(TEXT_ENCODER / "model.safetensors")
    assert len(state) == 36
    assert all(key.startswith(("text_model.embeddings.", "text_model.encoder.", "text_model.final_")) for key in state)


@pytest.mark.parametrize(("model", "folder"), [(CLIPTextModel, TEXT_ENCODER), (CLIPModel, emoji.CLIP)])
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
