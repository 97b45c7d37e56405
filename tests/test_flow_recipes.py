"""Recipes for flow transformers: the layers that get a LoRA, and the denoising steps that are trained on."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import (
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from stepfuse.train.arguments import parse_settings
from stepfuse.train.settings import DDPOSettings, DPOSettings, TrainSettings

CONFIGS = Path(__file__).parents[1] / "configs"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Networks as they are on the hub: those of SD 3.5 Medium and Klein by their configurations, the others by default.
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd35": (
        SD3Transformer2DModel,
        dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm")
        | dict(dual_attention_layers=tuple(range(13)), sample_size=128, pos_embed_max_size=384),
    ),
    "flux2-klein": (
        Flux2Transformer2DModel,
        dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
        | dict(guidance_embeds=False),
    ),
    "z-image": (ZImageTransformer2DModel, {}),
    "qwen-image": (QwenImageTransformer2DModel, {}),
}
# How many layers of each name there are in how many blocks.
EXPECTED = {
    # to_add_out is missing in the last block, whose text goes nowhere
    "sd35": {f"attn.{name}": 24 for name in (*ATTENTION, *ADDED)} | {"attn.to_add_out": 23},
    "flux2-klein": {f"attn.{name}": 5 for name in (*ATTENTION, *ADDED)}
    | {f"{part}.linear_{way}": 5 for part in ("ff", "ff_context") for way in ("in", "out")}
    | {"attn.to_qkv_mlp_proj": 20, "attn.to_out": 20},
    "z-image": {f"attention.{name}": 30 + 2 + 2 for name in ATTENTION}
    | {f"feed_forward.w{i}": 30 + 2 + 2 for i in (1, 2, 3)},
    "qwen-image": {f"attn.{name}": 60 for name in (*ATTENTION, *ADDED)}
    | {f"{part}.net.{layer}": 60 for part in ("img_mlp", "txt_mlp") for layer in ("0.proj", "2")},
}
# By the headers: billions of parameters of the network, and GB of LoRA, gradient and AdamW's two moments in float32.
MEMORY = {"sd35": (2.5, 0.3), "flux2-klein": (3.9, 1.5), "z-image": (6.2, 2.5), "qwen-image": (20.4, 6.8)}


def settings_of(file: Path, *flags: str) -> TrainSettings:
    settings = {"dpo": DPOSettings, "ddpo": DDPOSettings}[file.parent.name]
    return parse_settings(settings, ["--config", str(file), *flags])


def recipes(base: str) -> list[Path]:
    return sorted(CONFIGS.glob(f"d*po/{base}-*.yaml"))


@pytest.mark.parametrize("base", NETWORKS)
def test_the_layers_with_a_lora_are_those_of_attention_and_feed_forward_in_every_block(base: str) -> None:
    kind, config = NETWORKS[base]
    with init_empty_weights(include_buffers=True):
        network = kind(**config)
    (targets,) = {tuple(settings_of(file).lora_target_modules or ()) for file in recipes(base)}
    lora = LoraConfig(target_modules=list(targets))
    found = {name: module for name, module in network.named_modules() if check_target_module_exists(lora, name)}
    assert all(isinstance(module, nn.Linear) for module in found.values())
    assert all(any(f".{name}".endswith(f".{target}") for name in found) for target in targets)
    ends = sorted(EXPECTED[base], key=len, reverse=True)
    assert Counter(next(end for end in ends if name.endswith(f".{end}")) for name in found) == EXPECTED[base]

    billions, gigabytes = MEMORY[base]
    tensors = [*network.parameters(), *network.buffers()]  # SD 3's positions are a buffer
    assert sum(tensor.numel() for tensor in tensors) / 1e9 == pytest.approx(billions, abs=0.05)
    for file in recipes(base):
        rank = settings_of(file).rank
        numbers = sum(rank * (layer.in_features + layer.out_features) for layer in found.values())
        assert 4 * 4 * numbers / 1e9 == pytest.approx(gigabytes, abs=0.05)
        text = " ".join(file.read_text().replace("#", " ").split())
        assert f" {billions} B parameters in bf16" in text
        assert f" in float32 {gigabytes:g} GB" in text


@pytest.mark.parametrize("base", NETWORKS)
def test_adapters_of_one_flow_model_have_one_variance_length_and_number_of_steps(base: str) -> None:
    """The product weighs each by the inverse of its variance; and a set has one number of tokens."""
    found = [settings_of(file) for file in recipes(base)]
    assert (
        len({(str(s.initial_schedule()), s.sample_num_steps, s.resolution, s.max_sequence_length) for s in found}) == 1
    )
    assert {s.guidance for s in found} == {"off"}
