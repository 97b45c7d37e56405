"""Recipes for flow transformers: the layers that get a LoRA, and the denoising steps that are trained on."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from stepfuse.fuse.backbones.flow import linear_mu
from stepfuse.fuse.diffusion.noise_path import FlowPath
from stepfuse.fuse.diffusion.variance import step_variance
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


# Schedulers as they are on the hub.
QWEN = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
GRIDS: dict[str, dict[str, Any]] = {"sd35": dict(shift=3.0), "qwen-image": QWEN}
TOKENS = (512 // 16) ** 2


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


def shares(base: str, settings: TrainSettings) -> list[float]:
    """Of each step's KL in that of all: (dm/du)² / 2v for a change of the velocity u that is the same in all of them.

    x_0 = x_t - t u and e = x_t + (1 - t) u, so that dm/du = sqrt(s² - v) (1 - t) - (1 - s) t.
    """
    path = FlowPath(scheduler=FlowMatchEulerDiscreteScheduler(**GRIDS[base]))
    path = FlowPath(scheduler=path.scheduler, mu=linear_mu(path, TOKENS))
    found = []
    for t, s in path.steps(settings.sample_num_steps):
        v = step_variance(settings.initial_schedule(), path, t, s, torch.zeros(1, dtype=torch.float64)).item()
        derivative = (s**2 - v) ** 0.5 * (1 - t) - (1 - s) * t if v else 0.0
        found.append(derivative**2 / (2 * v) if v else 0.0)
    return [share / sum(found) for share in found]


@pytest.mark.parametrize("file", [file for base in GRIDS for file in recipes(base)], ids=lambda file: file.stem)
def test_no_step_that_is_trained_on_carries_nine_tenths_of_the_kl(file: Path) -> None:
    """For Qwen-Image the step to sigma 0.02 has nearly all of it; the last step, to 0, is not random."""
    base = next(base for base in GRIDS if file.name.startswith(base))
    settings = settings_of(file)
    found = shares(base, settings)
    trained = found[settings.skip_first_steps : len(found) - settings.skip_last_steps]
    assert max(trained) < 0.9 * sum(trained)
    if base == "qwen-image":
        assert found[-1] == 0
        assert found[-2] == pytest.approx(0.97, abs=0.005)  # as the recipes say
