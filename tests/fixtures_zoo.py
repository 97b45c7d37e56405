"""A zoo of adapters for the tiny Stable Diffusion, made and saved by peft and diffusers, and what becomes of each."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tests.fixtures_tiny import LATENT

ATTENTION = ["attn1.to_q", "attn2.to_k", "to_out.0"]
LINEAR = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "time_emb_proj", "time_embedding.linear_1"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"]
POINTS = ["conv_shortcut", "proj_in", "proj_out"]  # 1×1
BIASED = ["to_out.0", "ff.net.2", "conv1", "conv_out"]
TEXT = ["q_proj", "v_proj"]
FIRST = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FUSES, SEPARATE, NETWORK_ONLY = "fuses", "fuses one forward an adapter", "fuses without its text encoder"


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One kind of adapter.

    Attributes:
        config: of the UNet's; by default there is none.
        text: of the text encoder's.
        layout: `diffusers`, a file with peft's configuration in its header; `bare`, without; `script`, bare and under
            the names that diffusers' training scripts give to attention; `peft`, a folder.
        dtype: of the file.
        outcome: FUSES, SEPARATE or NETWORK_ONLY, or what the refusal says.
    """

    config: PeftConfig | None = None
    text: PeftConfig | None = None
    layout: str = "diffusers"
    dtype: torch.dtype = torch.float32
    outcome: str | tuple[str, ...]

    @property
    def refused(self) -> tuple[str, ...]:
        """What the refusal of the file as it is says; nothing if it is taken."""
        if isinstance(self.outcome, str):
            return ("text_encoder", "--network_only") if self.outcome == NETWORK_ONLY else ()
        return self.outcome


def lora(
    *, r: int = 4, lora_alpha: float = 4, target_modules: list[str] | str = ATTENTION, **options: Any
) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, **options)


ZOO = {
    "rank_1": Specimen(config=lora(r=1, lora_alpha=1), outcome=FUSES),
    "rank_4": Specimen(config=lora(lora_alpha=8), outcome=FUSES),
    "rank_16": Specimen(config=lora(r=16, lora_alpha=4, target_modules=LINEAR), outcome=FUSES),
    "rank_64": Specimen(config=lora(r=64, lora_alpha=16, target_modules=["to_q", "conv1"]), outcome=FUSES),
    "linear": Specimen(config=lora(target_modules=LINEAR), outcome=FUSES),
    "convolutions": Specimen(config=lora(target_modules=CONVOLUTIONS), outcome=FUSES),
    "points_of_rank_1": Specimen(config=lora(r=1, lora_alpha=2, target_modules=POINTS), outcome=FUSES),
    "both": Specimen(config=lora(lora_alpha=3, target_modules=[*LINEAR, *CONVOLUTIONS]), outcome=FUSES),
    "by_expression": Specimen(config=lora(target_modules=r".*attn2\.to_[qk]"), outcome=FUSES),
    "ranks": Specimen(
        config=lora(rank_pattern={"to_k": 7, "^conv_in": 2}, target_modules=[*ATTENTION, "conv_in"]), outcome=FUSES
    ),
    "alphas": Specimen(
        config=lora(alpha_pattern={"attn2.to_k": 9, f"^{FIRST}": 1}, target_modules=[*ATTENTION, "conv1"]),
        outcome=FUSES,
    ),
    "ranks_and_alphas": Specimen(config=lora(rank_pattern={"to_q": 6}, alpha_pattern={"to_q": 3}), outcome=FUSES),
    "rank_stabilised": Specimen(config=lora(r=6, lora_alpha=3, use_rslora=True), outcome=FUSES),
    "rank_stabilised_ranks": Specimen(
        config=lora(use_rslora=True, rank_pattern={"to_k": 9}, alpha_pattern={"to_out.0": 2}), outcome=FUSES
    ),
    "dora": Specimen(config=lora(lora_alpha=3, target_modules=LINEAR, use_dora=True), outcome=FUSES),
    "dora_of_convolutions": Specimen(
        config=lora(r=2, lora_alpha=5, target_modules=CONVOLUTIONS, use_dora=True), outcome=FUSES
    ),
    "dora_rank_stabilised": Specimen(config=lora(use_dora=True, use_rslora=True), outcome=FUSES),
    "orthogonal": Specimen(config=lora(init_lora_weights="orthogonal"), outcome=FUSES),
    "dropout": Specimen(config=lora(lora_dropout=0.5), outcome=FUSES),
    "in_float16": Specimen(config=lora(lora_alpha=8), dtype=torch.float16, outcome=FUSES),
    "in_bfloat16": Specimen(
        config=lora(lora_alpha=3, target_modules=[*ATTENTION, "conv1"]), dtype=torch.bfloat16, outcome=FUSES
    ),
    "dora_float16": Specimen(config=lora(use_dora=True), dtype=torch.float16, outcome=FUSES),
    "bare": Specimen(config=lora(target_modules=[*LINEAR, *CONVOLUTIONS]), layout="bare", outcome=FUSES),
    "bare_ranks": Specimen(config=lora(rank_pattern={"to_k": 7}), layout="bare", outcome=FUSES),
    "bare_dora": Specimen(config=lora(use_dora=True), layout="bare", outcome=FUSES),
    "script": Specimen(config=lora(), layout="script", outcome=FUSES),
    "script_ranks": Specimen(config=lora(rank_pattern={"to_out.0": 2}), layout="script", outcome=FUSES),
    "script_dora": Specimen(config=lora(use_dora=True), layout="script", outcome=FUSES),
    "peft_folder": Specimen(
        config=lora(lora_alpha=3, rank_pattern={"to_k": 2}, target_modules=[*LINEAR, "conv1"]),
        layout="peft",
        outcome=FUSES,
    ),
    "peft_dora": Specimen(config=lora(use_dora=True, use_rslora=True), layout="peft", outcome=FUSES),
    "with_bias": Specimen(config=lora(lora_alpha=3, target_modules=BIASED, lora_bias=True), outcome=SEPARATE),
    "bare_bias": Specimen(config=lora(target_modules=BIASED, lora_bias=True), layout="bare", outcome=SEPARATE),
    "with_text": Specimen(config=lora(lora_alpha=8), text=lora(target_modules=TEXT), outcome=NETWORK_ONLY),
    "bare_with_text": Specimen(config=lora(), text=lora(target_modules=TEXT), layout="bare", outcome=NETWORK_ONLY),
    "text_alone": Specimen(text=lora(target_modules=TEXT), outcome=("text_encoder",)),
    "pissa": Specimen(config=lora(init_lora_weights="pissa"), outcome=("'pissa'", "changes the base")),
    "pissa_fast": Specimen(config=lora(init_lora_weights="pissa_niter_4"), outcome=("'pissa_niter_4'", "the base")),
    "pissa_folder": Specimen(config=lora(init_lora_weights="pissa"), layout="peft", outcome=("'pissa'", "the base")),
    "olora": Specimen(config=lora(init_lora_weights="olora"), outcome=("'olora'", "changes the base")),
    "whole_layer": Specimen(config=lora(modules_to_save=["conv_in"]), outcome=("conv_in",)),
    "whole_layer_folder": Specimen(config=lora(modules_to_save=["conv_in"]), layout="peft", outcome=("conv_in",)),
    "biases": Specimen(config=lora(bias="all"), outcome=("bias",)),
    "biases_folder": Specimen(config=lora(bias="lora_only"), layout="peft", outcome=("'lora_only'", "biases")),
    "ranks_by_expression": Specimen(
        config=lora(rank_pattern={r".*to_[qk]": 2}), outcome=("rank_pattern", "'.*to_[qk]'")
    ),
    "loha": Specimen(config=LoHaConfig(r=4, target_modules=ATTENTION), layout="bare", outcome=("hada_w1_a", "LoHa")),
    "loha_folder": Specimen(config=LoHaConfig(r=4, target_modules=ATTENTION), layout="peft", outcome=("'LOHA'",)),
    "lokr": Specimen(config=LoKrConfig(r=4, target_modules=ATTENTION), layout="bare", outcome=("lokr_w1", "LoKr")),
    "lokr_folder": Specimen(config=LoKrConfig(r=4, target_modules=ATTENTION), layout="peft", outcome=("'LOKR'",)),
    "ia3": Specimen(
        config=IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]),
        layout="bare",
        outcome=("ia3_l", "IA3"),
    ),
    "ia3_folder": Specimen(
        config=IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]), layout="peft", outcome=("'IA3'",)
    ),
    "oft_folder": Specimen(
        config=OFTConfig(oft_block_size=4, target_modules=ATTENTION), layout="peft", outcome=("'OFT'",)
    ),
}


def make(specimen: Specimen, place: Path, base: DiffusionPipeline, *, seed: int) -> Path:
    """Save one adapter of random weights; a file of the name, or the folder."""
    pipeline = copy.deepcopy(base)
    if specimen.layout == "peft":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(pipeline.unet, specimen.config)
        randomise(model, seed)
        model.save_pretrained(str(place))
        return place
    parts: dict[str, Any] = {}
    for part, config in (("unet", specimen.config), ("text_encoder", specimen.text)):
        if config is None:
            continue
        model = getattr(pipeline, part)
        add(model, "default", config, seed=seed)
        state = {k: v.to(specimen.dtype).contiguous() for k, v in get_peft_model_state_dict(model).items()}
        parts[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if specimen.layout == "script" else state
        if specimen.layout == "diffusers":
            parts[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(place.parent, weight_name=f"{place.name}.safetensors", **parts)
    return place.with_name(f"{place.name}.safetensors")


def add(model: nn.Module, name: str, config: PeftConfig, *, seed: int) -> None:
    """Put an adapter of random weights on a model, by peft; on a model that has one peft warns."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        torch.manual_seed(seed)
        model.add_adapter(config, name)
    randomise(model, seed, name)


def randomise(model: nn.Module, seed: int, name: str = "default") -> None:
    """Other values than those that training begins with, where a LoRA changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        if f"lora_B.{name}." in key:
            value.data.normal_(std=0.1, generator=generator)
        elif f"lora_magnitude_vector.{name}." in key:
            value.data.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))


def load_alone(base: DiffusionPipeline, weights: Mapping[Path, float]) -> DiffusionPipeline:
    """A pipeline of its own with these adapters on it, as a user of diffusers loads them, or of peft, a folder."""
    pipeline = copy.deepcopy(base)
    names = [f"adapter_{i}" for i in range(len(weights))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name, place in zip(names, weights, strict=True):
            if place.is_dir():
                pipeline.unet.add_adapter(LoraConfig.from_pretrained(str(place)), name)
                state = load_file(place / "adapter_model.safetensors")
                state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
                assert not set_peft_model_state_dict(pipeline.unet, state, name).unexpected_keys
            else:
                pipeline.load_lora_weights(place, adapter_name=name)
    if names:
        pipeline.set_adapters(names, list(weights.values()))
    pipeline.unet.eval()  # a dropout that peft adds is on
    return pipeline


EVERYTHING = ["to_q", "to_k", "to_v", *LINEAR, "linear_1", "linear_2", *POINTS, *CONVOLUTIONS]
KINDS = {
    "plain": lora(lora_alpha=3, target_modules=EVERYTHING),
    "rank_stabilised": lora(r=6, lora_alpha=3, use_rslora=True, target_modules=[*ATTENTION, *CONVOLUTIONS]),
    "patterns": lora(
        rank_pattern={"to_k": 7, "conv1": 2}, alpha_pattern={"conv1": 9, f"^{FIRST}": 1}, target_modules=EVERYTHING
    ),
    "rank_stabilised_patterns": lora(rank_pattern={"to_q": 2}, use_rslora=True),
    "dora": lora(use_dora=True, target_modules=[*ATTENTION, "conv1"]),
    "with_bias": lora(lora_bias=True, target_modules=BIASED),
}


@torch.no_grad()
def predict(unet):
    """For two latents; SDXL's sizes and pooled text beside the text."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    added = dict(text_embeds=randn(2, 24), time_ids=randn(2, 6).abs())
    states = randn(2, 7, 32 if unet.config.addition_embed_type is None else 64)
    return unet(randn(2, *LATENT), 500, encoder_hidden_states=states, added_cond_kwargs=added).sample


def assert_alike(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
