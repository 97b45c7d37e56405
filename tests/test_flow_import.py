"""The commands of docs/importing-flow-loras.md, with adapters as Flow-GRPO's training saves them."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open

from stepfuse.fuse.backbones.guidance import Branch
from stepfuse.fuse.backbones.loading import load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.mixture import BASE, Network
from stepfuse.fuse.sampling.sampler import FusedSampler
from stepfuse.fuse.sets.adapter_set import load_set
from stepfuse.scripts.cli.main import main
from tests.fixtures_documents import blocks
from tests.fixtures_families import save_family
from tests.fixtures_sampler import assert_near

MODEL = "stabilityai/stable-diffusion-3.5-medium"
NAMES = ("PickScore", "Text", "GenEval")
# scripts/train_sd3.py of yifan123/flow_grpo, but for rank 32 and alpha 64.
TARGETS = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
LORA = dict(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=[f"attn.{name}" for name in TARGETS])
SMALL = {"512": "32", "bfloat16": "float32", "cuda": "cpu", "40": "4"}  # of the documents' numbers, for the tiny base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the hub ids of the commands are folders, and where they have been run."""
    place = tmp_path_factory.mktemp("hub")
    base = save_family("sd3", place / MODEL)
    for seed, name in enumerate(NAMES):
        network = get_peft_model(load_pipeline(str(base)).transformer, LoraConfig(**LORA))
        generator = torch.Generator().manual_seed(seed)
        for key, value in network.named_parameters():
            if "lora_B" in key:  # which are zero before training
                value.data.normal_(std=0.3, generator=generator)
        network.save_pretrained(place / f"jieliu/SD3.5M-FlowGRPO-{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        first, second = blocks("docs/importing-flow-loras.md", "bash")
        for command in (first + second).replace("\\\n", " ").splitlines():
            program, *words = shlex.split(command)
            assert program == "stepfuse"
            main([SMALL.get(word, word) for word in words])
    return place


def test_the_files_have_the_names_and_the_configuration_that_the_document_states(place: Path) -> None:
    folder = place / "jieliu/SD3.5M-FlowGRPO-Text"
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        keys = set(tensors.keys())
    assert "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight" in keys
    assert all(key.startswith("base_model.model.transformer_blocks.") and ".attn." in key for key in keys)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 8, set(LORA["target_modules"]))


def test_the_commands_make_a_set_of_the_declared_variances_and_draw_with_it(place: Path) -> None:
    loaded = load_set(place / "outputs/flow-grpo")
    assert loaded.names == ["pickscore", "text", "geneval"]
    assert {adapter.objective.variance for adapter in loaded.adapters} == {EtaSchedule(eta=0.495)}
    assert (loaded.guidance, loaded.guidance_scale, loaded.num_inference_steps) == ("full", 4.5, 4)
    assert loaded.adapters[0].objective.reward == "pickscore"
    assert loaded.base_schedule == EtaSchedule(eta=1.0)
    again = load_set(place / "outputs/flow-grpo-fused")
    assert (again.names, again.base_schedule) == (loaded.names, EtaSchedule(eta=0.495))
    assert [a.sha256 for a in again.adapters] == [a.sha256 for a in loaded.adapters]
    with Image.open(place / "sign.png") as picture:
        assert picture.size == (32, 32)  # by --resolution; the base's own size is 16
        colours = picture.convert("RGB").getcolors(maxcolors=2**20)
    assert len(colours) > 16


def test_an_imported_adapter_predicts_what_peft_predicts_with_its_files(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)  # the base's name is that of a folder here
    sampler = FusedSampler.from_pretrained("outputs/flow-grpo")
    conditioning = sampler.backbone.encode(["a sign"], [""])
    x = torch.randn(1, *sampler.backbone.shape(), generator=torch.Generator().manual_seed(0))
    (base,) = sampler.denoiser.run(x, 0.7, conditioning, [Branch(BASE, "+")])
    for objective, name in zip(("pickscore", "text", "geneval"), NAMES, strict=True):
        (ours,) = sampler.denoiser.run(x, 0.7, conditioning, [Branch(Network.of(objective), "+")])
        theirs = PeftModel.from_pretrained(load_pipeline(MODEL).transformer, f"jieliu/SD3.5M-FlowGRPO-{name}")
        with torch.no_grad():
            expected = theirs(
                hidden_states=x,
                timestep=torch.tensor([700.0]),
                encoder_hidden_states=conditioning.positive["prompt_embeds"],
                pooled_projections=conditioning.positive["pooled_prompt_embeds"],
                return_dict=False,
            )[0]
        assert_near(ours, expected)
        assert not torch.allclose(ours, base, rtol=0.01, atol=0.01)
