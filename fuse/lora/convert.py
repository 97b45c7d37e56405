"""LoRAs from elsewhere: every layout that states layer, factor and scale without doubt.

One pass names every tensor (`stepfuse.fuse.lora.keys`), then one reader checks shapes, scale and fit. The scale of a
layer is `alpha / r`, alpha being

- the tensor `….alpha` of the layer (kohya-ss/sd-scripts, LyCORIS, OneTrainer);
- else what peft's configuration says, in the header (diffusers ≥ 0.34) or in `adapter_config.json` beside the file;
- else the rank, which is what diffusers, kohya-ss/sd-scripts and ComfyUI take it for.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from stepfuse.fuse.lora.export import PEFT_CONFIG, PEFT_WEIGHTS
from stepfuse.fuse.lora.factors import Factors
from stepfuse.fuse.lora.file import (
    DTYPES,
    SMALL_DTYPES,
    LoRALayer,
    check_config,
    check_fits,
    check_layers,
    plain_modules,
    read_configs,
    read_header,
)
from stepfuse.fuse.lora.keys import ALPHA, BIAS, DOWN, MAGNITUDE, TEXT, UP, LayerTable, LoRAKey, parse_key
from stepfuse.fuse.lora.safe_files import WEIGHTS, check_no_pickle, read_object

Found = dict[str, dict[str, LoRAKey]]  # by the layer's path, then by kind


def read_foreign(file: Path, unet: UNet2DConditionModel, *, unet_only: bool) -> dict[str, Factors]:
    """The layers of a LoRA in any layout that names layers and factors, for a UNet.

    Args:
        file: a safetensors file, a folder as peft or diffusers saves one, or a folder that holds no other such file.
        unet: of the base, with or without LoRAs.
        unet_only: leave out what is of text encoders.

    Returns:
        Factors by the layer's path in the UNet.

    Raises:
        ValueError: for a pickle, another kind of adapter, layers that the UNet does not have, parts of text encoders,
            and anything whose layer or scale is in doubt.
    """
    if file.is_dir():
        file = _file_in(file)
    check_no_pickle(file)
    if not file.is_file():
        raise ValueError(f"no LoRA weights at {file}")
    shapes, metadata = read_header(file, lambda key: parse_key(key).part != TEXT, dtypes=DTYPES + SMALL_DTYPES)
    names = [parse_key(key) for key in shapes]
    beside = _config_beside(file, names)
    own = _of_unet(file, names, unet_only=unet_only)
    if not own:
        raise ValueError(f"{file} has no layers of a UNet; nothing of it can be fused")
    modules = dict(plain_modules(unet))
    found = _by_layer(file, own, LayerTable(modules, unet.config))
    config = read_configs(file, metadata, ("unet",), bare=True).get("unet")
    if config is None:
        config = beside
        if config is None:
            _check_wrapped(file, found)
    stated = {
        module: {kind: _shape_for(modules[module], shapes[name.key], kind) for kind, name in kinds.items()}
        for module, kinds in found.items()
    }
    layers = check_layers(file, "unet", {m: _without_alpha(kinds) for m, kinds in stated.items()}, config)
    check_fits(file, layers, unet)
    return _read(file, found, layers, stated, config)


def _file_in(folder: Path) -> Path:
    """The weights in a folder: under the name that peft or diffusers gives them, or the only safetensors file.

    Raises:
        ValueError: for several, and for pickles alone.
    """
    usual = folder / (PEFT_WEIGHTS if (folder / PEFT_CONFIG).is_file() else WEIGHTS)
    if usual.is_file():
        return usual
    check_no_pickle(next((pickle for pickle in [usual.with_suffix(".bin")] if pickle.is_file()), usual))
    found = sorted(place for pattern in ("*", "*/*") for place in folder.glob(f"{pattern}.safetensors"))
    found = [place for place in found if not any(part.startswith(".") for part in place.relative_to(folder).parts)]
    if len(found) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found[:10])
        raise ValueError(f"{folder} has several safetensors files, {names}; choose one with --weight_name")
    return found[0] if found else usual


def _of_unet(file: Path, names: Sequence[LoRAKey], *, unet_only: bool) -> list[LoRAKey]:
    """The tensors of the UNet, all of one adapter."""
    own = [name for name in names if name.part != TEXT]
    strange = [name for name in own if name.refusal]
    if strange:
        # Weights and biases that are named so plainly may be part of another kind of adapter.
        plain = (parse_key("x.weight").refusal, parse_key("x").refusal)
        worst = next((name for name in strange if name.refusal not in plain), strange[0])
        raise ValueError(f"{file}: tensor {worst.key[:100]!r} is of {worst.refusal}")
    texts = [name.key for name in names if name.part == TEXT]
    if texts and not unet_only:
        raise ValueError(
            f"{file} has tensors of a text_encoder or an embedding too ({texts[0][:100]!r}), and fused adapters share "
            "one embedding of the prompt: --unet_only leaves them out, which changes what the LoRA does"
        )
    adapters = {name.adapter or "" for name in own if name.kind != ALPHA}
    if len(adapters) > 1:
        told = ", ".join(repr(name) for name in sorted(adapters))
        raise ValueError(f"{file} holds several adapters, {told}; save each of them to a separate file")
    return own


def _by_layer(file: Path, names: Sequence[LoRAKey], table: LayerTable) -> Found:
    """The tensors by the layers of the base."""
    found: Found = {}
    for name in names:
        try:
            module = table.find(name)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        kinds = found.setdefault(module, {})
        if name.kind in kinds:
            raise ValueError(
                f"{file}: tensors {kinds[name.kind].key[:100]!r} and {name.key[:100]!r} are both the same factor of "
                f"{module}; expected one layout in a file"
            )
        kinds[name.kind] = name
    for kinds in found.values():
        if not {DOWN, UP} <= kinds.keys():
            (first, *_), factors = kinds.values(), {DOWN: "lora_down", UP: "lora_up"}
            there = next((text for kind, text in factors.items() if kind in kinds), None) or next(iter(kinds))
            stem = first.key.partition(".")[0] if first.flat else first.layer
            raise ValueError(f"{file}: {stem} has {there} alone ({first.key[:100]!r}); fetch the file again")
    return found


def _config_beside(file: Path, names: Sequence[LoRAKey]) -> dict[str, Any] | None:
    """peft's configuration in a file beside the weights, for keys that have peft's wrapper in them."""
    place = file.parent / PEFT_CONFIG
    if not place.is_file() or not any("base_model.model." in name.key for name in names):
        return None
    values = read_object(place, "the configuration peft saves beside the weights")
    config = {key: value for key, value in values.items() if value}
    check_config(place, config)
    return config


def _check_wrapped(file: Path, found: Found) -> None:
    """See that weights as peft alone writes them, which come without its configuration, state their alpha."""
    for kinds in found.values():
        if kinds[DOWN].wrapped and ALPHA not in kinds:
            raise ValueError(
                f"no {PEFT_CONFIG} in {file.parent}; {kinds[DOWN].key[:100]!r} has peft's wrapper base_model.model., "
                "and peft writes alpha to that file: put it beside the weights"
            )


def _shape_for(module: nn.Module, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Some tools write the factors of a convolution as matrices, or those of a linear layer as convolutions."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kind not in (DOWN, UP) or len(shape) not in (2, 4) or len(shape) == weight.ndim:
        return shape
    if weight.ndim == 2:
        return (shape[0], math.prod(shape[1:]))
    inputs = tuple(weight.shape[1:])
    return (shape[0], *inputs) if kind == DOWN and shape[1] == math.prod(inputs) else (*shape, 1, 1)


def _without_alpha(kinds: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {kind: shape for kind, shape in kinds.items() if kind != ALPHA}


def _read(
    file: Path,
    found: Found,
    layers: Mapping[str, LoRALayer],
    stated: Mapping[str, Mapping[str, tuple[int, ...]]],
    config: Mapping[str, Any] | None,
) -> dict[str, Factors]:
    """Tensors and scales of layers that were checked."""
    factors = {}
    with safe_open(file, framework="pt") as tensors:
        for module, kinds in found.items():
            state = {kind: _computable(tensors.get_tensor(name.key)) for kind, name in kinds.items()}
            shaped = {kind: value.reshape(stated[module][kind]) for kind, value in state.items()}
            layer = layers[module]
            alpha = layer.scaling * layer.rank
            if ALPHA in state:
                alpha = _alpha(file, kinds[ALPHA].key, state[ALPHA], None if config is None else alpha)
            factors[module] = Factors(
                down=shaped[DOWN],
                up=shaped[UP],
                alpha=alpha,
                magnitude=shaped.get(MAGNITUDE),
                bias=shaped.get(BIAS),
            )
    return factors


def _computable(value: Tensor) -> Tensor:
    """float8 as float16, which holds each of its values; torch computes with few operations in float8."""
    return value.half() if value.is_floating_point() and value.element_size() == 1 else value


def _alpha(file: Path, key: str, value: Tensor, configured: float | None) -> float:
    """The alpha that a tensor states; a configuration may not state another."""
    alpha = float(value) if value.numel() == 1 else math.nan
    if not 0 < alpha < 2**31:
        raise ValueError(f"{file}: {key[:100]} has alpha {value.flatten()[:4].tolist()}; expected one positive number")
    if configured is not None and not math.isclose(alpha, configured, rel_tol=1e-3):
        raise ValueError(
            f"{file}: {key[:100]} has alpha {alpha:g}, and the metadata of the file says {configured:g}; expected the "
            "same"
        )
    return alpha
