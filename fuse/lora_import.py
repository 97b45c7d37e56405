"""LoRAs from elsewhere: in kohya's layout, peft's, and diffusers', of today and of before peft."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepfuse.fuse.adapter import WEIGHTS, check_parts
from stepfuse.fuse.factors import Factors, read_factors
from stepfuse.fuse.kohya import PREFIX, TEXT_ENCODERS, module_table
from stepfuse.fuse.lora_export import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from stepfuse.fuse.lora_file import METADATA, check_config, open_lora, plain_modules, read_configs, read_header
from stepfuse.fuse.manifest import check_no_pickle, read_object

OLDER = (".lora.down.weight", "_lora.down.weight")


def read_foreign(file: Path, unet: UNet2DConditionModel, *, unet_only: bool) -> dict[str, Factors]:
    """The layers of a LoRA in kohya's, peft's, or one of diffusers' layouts, for a UNet.

    Args:
        file: a safetensors file, or a folder as peft saves one.
        unet_only: leave out what is of text encoders.

    Raises:
        ValueError: for a pickle, another kind of adapter, layers that the UNet has not, or parts of text encoders.
    """
    if file.is_dir():
        file = file / (PEFT_WEIGHTS if (file / PEFT_CONFIG).is_file() else WEIGHTS)
    check_no_pickle(file)
    if not file.is_file():
        raise ValueError(f"no LoRA weights at {file}")
    shapes, metadata = read_header(file)
    if any(key.startswith((PREFIX, *TEXT_ENCODERS)) for key in shapes):
        factors = _from_kohya(file, shapes, unet, unet_only=unet_only)
    elif all(key.startswith(PEFT_PREFIX) for key in shapes):
        factors = _from_peft(file)
    elif any(".lora_A." in key for key in shapes) and not any(key.endswith(OLDER) for key in shapes):
        lora = open_lora(file)
        if not unet_only:
            check_parts(lora)
        factors = read_factors(lora)
    else:
        factors = _from_older(file, metadata, unet_only=unet_only)
    if not factors:
        raise ValueError(f"{file} has no layers of a UNet; nothing of it can be fused")
    return factors


def _from_kohya(
    file: Path, shapes: Mapping[str, Any], unet: UNet2DConditionModel, *, unet_only: bool
) -> dict[str, Factors]:
    modules = (name for name, module in plain_modules(unet) if isinstance(module, nn.Linear | nn.Conv2d))
    table = module_table(modules, unet.config)
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    for key in shapes:
        if key.startswith(TEXT_ENCODERS) and not unet_only:
            raise ValueError(
                f"{file} is of a text encoder too ({key[:60]}); fused adapters share one embedding of the prompt: "
                "--unet_only leaves it out, which changes what it does"
            )
        if key.startswith(PREFIX) and not key.endswith(ends):
            what = (
                "a DoRA in a layout that tools compute differently" if key.endswith("dora_scale") else "no plain LoRA"
            )
            raise ValueError(f"{file}: tensor {key[:100]!r} is of {what}; expected {', '.join(ends)}")
        if not key.startswith((PREFIX, *TEXT_ENCODERS)):
            raise ValueError(f"{file}: tensor {key[:100]!r} is not of kohya's layout, as the others are")
        if key.startswith(PREFIX) and key.partition(".")[0] not in table:
            raise ValueError(f"{file}: the base has no layer {key.partition('.')[0]!r}; the LoRA is of another one")
    state = load_file(file)
    factors = {}
    for name in sorted({key.partition(".")[0] for key in state if key.startswith(PREFIX)}):
        down, up = (state.get(f"{name}.lora_{what}.weight") for what in ("down", "up"))
        if down is None or up is None:
            there = "alpha" if down is up else "lora_up" if down is None else "lora_down"
            raise ValueError(f"{file}: {name} has {there} alone; fetch the file again")
        if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[1] != len(down) or not down.numel():
            raise ValueError(
                f"{file}: {name} has A of shape {list(down.shape)} and B of {list(up.shape)}, which do not go together"
            )
        alpha = state.get(f"{name}.alpha", torch.tensor(float(len(down))))
        if alpha.numel() != 1 or not 0 < float(alpha) < 2**31:
            raise ValueError(f"{file}: {name} has alpha {alpha.tolist()}; expected a positive number")
        factors[table[name]] = Factors(down=down, up=up, alpha=float(alpha))
    return _shaped_like(factors, unet)


def _shaped_like(factors: Mapping[str, Factors], unet: nn.Module) -> dict[str, Factors]:
    """Some trainers write the factors of a convolution of one pixel as matrices, or the other way round."""
    modules = dict(plain_modules(unet))
    shaped = {}
    for name, layer in factors.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        dims = weight.ndim
        down, up = (
            factor[..., None, None] if dims > factor.ndim else factor.flatten(1) if dims < factor.ndim else factor
            for factor in (layer.down, layer.up)
        )
        shaped[name] = Factors(down=down, up=up, alpha=layer.alpha)
    return shaped


def _from_peft(file: Path) -> dict[str, Factors]:
    place = file.parent / PEFT_CONFIG
    config = {k: v for k, v in read_object(place, "the configuration peft saves beside the weights").items() if v}
    check_config(place, config)
    state = {"unet." + key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
    return _through_file(file, state, config)


def _from_older(file: Path, metadata: Mapping[str, str], *, unet_only: bool) -> dict[str, Factors]:
    """diffusers' names before peft, `unet.….attn1.processor.to_q_lora.down.weight`, and those of its training scripts,
    `unet.….attn1.to_q.lora.down.weight`; without peft's configuration in the header alpha is the rank."""
    state = load_file(file)
    others = [key for key in state if not key.startswith("unet.")]
    texts = all(key.startswith("text_encoder") for key in others)
    if others and texts and not unet_only:
        raise ValueError(f"{file} is of a text encoder too, which cannot be fused: --unet_only leaves it out")
    if others and not texts:
        raise ValueError(f"{file}: tensor {others[0][:100]!r} is of no layout known here; expected a UNet's LoRA")
    own = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    converted = {f"unet.{key}": value for key, value in convert_unet_state_dict_to_peft(own).items()}
    return _through_file(file, converted, read_configs(file, metadata).get("unet"))


def _through_file(file: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Factors]:
    """Tensors of a file in today's layout as the one reader of that layout sees them."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / WEIGHTS
        packed = {f"unet.{key}": value for key, value in (config or {}).items()}
        metadata = {METADATA: json.dumps(packed)} if packed else {}
        save_file({key: value.contiguous() for key, value in state.items()}, place, metadata=metadata)
        try:
            return read_factors(open_lora(place))
        except ValueError as error:
            raise ValueError(str(error).replace(str(place), str(file))) from None
