"""Transformers of the flow families with random LoRAs, for tests of names and layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from stepfuse.fuse.backbones.flux2_names import Flux2Names
from stepfuse.fuse.backbones.flux_names import FluxNames
from stepfuse.fuse.backbones.lumina2_names import Lumina2Names
from stepfuse.fuse.backbones.qwen_image_names import QwenImageNames
from stepfuse.fuse.backbones.sana_names import SanaNames
from stepfuse.fuse.backbones.sd3_names import StableDiffusion3Names
from stepfuse.fuse.backbones.transformer_names import TransformerNames
from stepfuse.fuse.backbones.z_image_names import ZImageNames
from stepfuse.fuse.lora.convert import read_foreign
from stepfuse.fuse.lora.factors import Factors


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family: diffusers' classes, the names, and a configuration of few layers.

    Attributes:
        wide: what makes the layers as wide as the published ones, whose widths diffusers' converters hold fixed.
        published: configurations of published models, where they differ from the class's defaults.
    """

    network: str
    pipeline: str
    names: type[TransformerNames]
    small: dict[str, Any]
    wide: dict[str, Any]
    published: dict[str, dict[str, Any]]


SD3_5 = dict(pos_embed_max_size=384, qk_norm="rms_norm")
HEADS = dict(num_attention_heads=2, attention_head_dim=8)
FAMILIES = {
    "sd3": Family(
        network="SD3Transformer2DModel",
        pipeline="StableDiffusion3Pipeline",
        names=StableDiffusion3Names,
        small=HEADS
        | dict(num_layers=3, sample_size=4, in_channels=4, joint_attention_dim=6, caption_projection_dim=16)
        | dict(pooled_projection_dim=10, pos_embed_max_size=4, qk_norm="rms_norm", dual_attention_layers=(0,)),
        wide={},
        published={
            "3 medium": dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
            "3.5 medium": SD3_5
            | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
            | dict(dual_attention_layers=tuple(range(13))),
            "3.5 large": SD3_5 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432),
        },
    ),
    "flux": Family(
        network="FluxTransformer2DModel",
        pipeline="FluxPipeline",
        names=FluxNames,
        small=HEADS
        | dict(num_layers=1, num_single_layers=1, in_channels=4, joint_attention_dim=6, pooled_projection_dim=10)
        | dict(guidance_embeds=True, axes_dims_rope=(2, 2, 4)),
        wide=dict(num_attention_heads=24, attention_head_dim=128),
        published={"dev": dict(guidance_embeds=True), "schnell": {}},
    ),
    "flux2": Family(
        network="Flux2Transformer2DModel",
        pipeline="Flux2KleinPipeline",
        names=Flux2Names,
        small=HEADS
        | dict(num_layers=1, num_single_layers=1, in_channels=4, joint_attention_dim=6)
        | dict(axes_dims_rope=(2, 2, 2, 2)),
        wide={},
        published={
            "klein 4B": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
            | dict(guidance_embeds=False),
            "klein 9B": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
            | dict(guidance_embeds=False),
            "dev": {},
        },
    ),
    "qwen": Family(
        network="QwenImageTransformer2DModel",
        pipeline="QwenImagePipeline",
        names=QwenImageNames,
        small=HEADS
        | dict(num_layers=2, in_channels=16, out_channels=4, joint_attention_dim=6, axes_dims_rope=(2, 2, 4)),
        wide={},
        published={"Qwen-Image": {}},
    ),
    "z_image": Family(
        network="ZImageTransformer2DModel",
        pipeline="ZImagePipeline",
        names=ZImageNames,
        small=dict(in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=6)
        | dict(axes_dims=[4, 2, 2], axes_lens=[8, 8, 8]),
        wide={},
        published={"Z-Image": {}},
    ),
    "lumina2": Family(
        network="Lumina2Transformer2DModel",
        pipeline="Lumina2Pipeline",
        names=Lumina2Names,
        small=dict(sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1)
        | dict(num_attention_heads=6, num_kv_heads=2, cap_feat_dim=6, axes_dim_rope=(4, 0, 0), axes_lens=(8, 8, 8)),
        wide=dict(hidden_size=2304, num_attention_heads=24, num_kv_heads=8, axes_dim_rope=(32, 32, 32)),
        published={"Lumina-Image 2.0": {}},
    ),
    "sana": Family(
        network="SanaTransformer2DModel",
        pipeline="SanaPipeline",
        names=SanaNames,
        small=HEADS
        | dict(num_layers=1, in_channels=4, out_channels=4, num_cross_attention_heads=2, cross_attention_head_dim=8)
        | dict(cross_attention_dim=16, caption_channels=6, sample_size=4),
        wide={},
        published={"SANA 1.6B": {}},
    ),
}
IN_KOHYA = [family for family in FAMILIES if family != "sana"]


def transformer(family: str, *, device: str = "meta", **config: Any) -> Any:
    """A transformer of few layers, of another size by `config`."""
    made = FAMILIES[family]
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, made.network)(**(made.small | config))


def published(family: str, model: str) -> Any:
    """A transformer of a published model, without its weights."""
    made = FAMILIES[family]
    with torch.device("meta"):
        return getattr(diffusers, made.network)(**made.published[model])


def names_of(family: str, network: Any) -> TransformerNames:
    return FAMILIES[family].names(config=network.config)


def lora_pipeline(family: str) -> Any:
    return getattr(diffusers, FAMILIES[family].pipeline)


def layers_of(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def random_factors(layers: dict[str, Any], *, alpha: float | None = None, rank: int = 2) -> dict[str, Factors]:
    """LoRAs of layers, of a rank and by default of scale 1."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = {}
    for name, layer in layers.items():
        outputs, *inputs = layer.weight.shape
        up = normal(outputs, rank, *[1] * (len(inputs) - 1))
        made[name] = Factors(down=normal(rank, *inputs), up=up, alpha=float(rank if alpha is None else alpha))
    return made


def effect(down: torch.Tensor, up: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """s B A applied to three fixed inputs: matrices of the published width are not written out."""
    a, b = down.flatten(1).double(), up.flatten(1).double()
    probe = torch.randn(a.shape[1], 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return scale * b @ (a @ probe)


def effects(factors: dict[str, Factors]) -> dict[str, torch.Tensor]:
    return {name: effect(layer.down, layer.up, layer.scaling) for name, layer in factors.items()}


def assert_equal_effects(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 * float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


def diffusers_effects(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of what diffusers makes of a file; of FLUX.1 it leaves the prefix away from layers outside the blocks."""
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): effect(
            value, state[key.replace("lora_A", "lora_B")]
        )
        for key, value in state.items()
        if "lora_A" in key
    }


def save_state(state: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, file)
    return file


def read(file: Path, family: str, network: Any, *, network_only: bool = False) -> dict[str, Factors]:
    return read_foreign(file, network, names_of(family, network), network_only=network_only)


def original_state(
    family: str,
    network: Any,
    spell: Callable[[str], str],
    *,
    down: str = "lora_A",
    up: str = "lora_B",
    alpha: float | None = 3.0,
    where: str = "",
) -> dict[str, torch.Tensor]:
    """A LoRA trained on the original network, of rank 2: A and B of each of its layers, under names by `spell`."""
    names, layers = names_of(family, network), layers_of(network)
    originals = {names.original(module) for module in layers if where in module}
    generator, state = torch.Generator().manual_seed(0), {}
    for original in sorted(originals, key=lambda found: found.path):
        _, *inputs = layers[original.modules[0]].weight.shape
        rows = sum(len(layers[module].weight) for module in original.modules)
        stem = spell(original.path)
        state[f"{stem}.{down}.weight"] = torch.randn(2, *inputs, generator=generator)
        state[f"{stem}.{up}.weight"] = torch.randn(rows, 2, *[1] * (len(inputs) - 1), generator=generator)
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state


def kohya_name(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")
