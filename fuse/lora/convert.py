"""LoRAs from elsewhere: every layout that states layer, factor and scale unambiguously.

One pass names every tensor (`stepfuse.fuse.lora.keys`), then one reader checks shapes, scale and fit, and layers that
are several in diffusers' network are taken apart (`stepfuse.fuse.lora.joined_layers`). diffusers' own converters, which
tests compare with, are not called: several leave out layers or scales without an error. The scale of a layer is
`alpha / r`, alpha being

- the tensor `….alpha` of the layer (kohya-ss/sd-scripts, LyCORIS, OneTrainer);
- else what peft's configuration says, in the header (diffusers ≥ 0.34) or in `adapter_config.json` beside the file;
- else the rank, which is what diffusers, kohya-ss/sd-scripts and ComfyUI take it for.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stepfuse.data.json_file import read_json
from stepfuse.fuse.lora.config import check_config, read_config
from stepfuse.fuse.lora.export import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from stepfuse.fuse.lora.factors import Factors
from stepfuse.fuse.lora.families import families_of
from stepfuse.fuse.lora.file import check_layers, check_shapes, plain_modules
from stepfuse.fuse.lora.joined_layers import split
from stepfuse.fuse.lora.keys import ALPHA, DOWN, UP, LayerTable, LoRAKey, parse_key
from stepfuse.fuse.lora.names import LayerNames
from stepfuse.fuse.lora.safe_files import WEIGHTS, check_no_pickle
from stepfuse.fuse.lora.tensor_file import FLOATS, SMALL_FLOATS, open_tensors

Found = dict[str, dict[str, LoRAKey]]  # by the layer's path, then by kind


def read_foreign(file: Path, network: nn.Module, names: LayerNames, *, network_only: bool) -> dict[str, Factors]:
    """The layers of a LoRA in any layout that names layers and factors, for a network.

    Args:
        file: a safetensors file, a folder as peft or diffusers saves one, or a folder that holds no other such file.
        network: of the base, with or without LoRAs.
        names: of its layers in other tools' files.
        network_only: leave out what is of text encoders.

    Raises:
        ValueError: for a pickle, another kind of adapter, layers that the network does not have, parts of text
            encoders, and anything whose layer or scale is in doubt.
    """
    if file.is_dir():
        file = _file_in(file)
    check_no_pickle(file)
    part = names.part
    with open_tensors(file, lambda key: not parse_key(key, names).of_text, dtypes=(*FLOATS, *SMALL_FLOATS)) as tensors:
        keys = [parse_key(key, names) for key in tensors.tensors]
        beside = _config_beside(file, keys)
        of_network = _of_network(file, keys, names, network_only=network_only)
        if not of_network:
            raise ValueError(f"{file} has no layers of the network ({part}); nothing of it can be fused")
        table = LayerTable(dict(plain_modules(network)), names)
        found = _by_layer(file, of_network, table)
        config = read_config(file, tensors.metadata, part, any_layout=True) or beside
        if config is None:
            _check_wrapped(file, found)
        shapes = {
            path: {
                kind: _shape_for(table.modules[path], tensors.tensors[name.key].shape, kind)
                for kind, name in kinds.items()
                if kind != ALPHA
            }
            for path, kinds in found.items()
        }
        layers = check_layers(file, part, shapes, config)
        check_shapes(file, layers, table.modules)
        factors: dict[str, Factors] = {}
        for path, kinds in found.items():
            state = {kind: tensors.tensor(kinds[kind].key).reshape(shape) for kind, shape in shapes[path].items()}
            alpha = layers[path].alpha
            if ALPHA in kinds:
                key = kinds[ALPHA].key
                alpha = _alpha(file, key, tensors.tensor(key), None if config is None else alpha)
            layer, original = Factors.of(state, alpha), table.originals.get(path)
            parts = {path: layer} if original is None else split(layer, original, table.rows(original))
            if both := sorted(factors.keys() & parts.keys()):
                raise ValueError(
                    f"{file}: {path} and another layer are both of {both[0]}; expected one layout in a file"
                )
            factors |= parts
    return factors


def _file_in(folder: Path) -> Path:
    """The weights in a folder: under the name that peft or diffusers gives them, or the only safetensors file."""
    usual = folder / (PEFT_WEIGHTS if (folder / PEFT_CONFIG).is_file() else WEIGHTS)
    if usual.is_file():
        return usual
    if (pickle := usual.with_suffix(".bin")).is_file():
        check_no_pickle(pickle)
    found = sorted(file for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}.safetensors"))
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in found[:10])
        raise ValueError(f"{folder} has several safetensors files, {names}; choose one with --weight_name")
    return found[0] if found else usual


def _of_network(file: Path, keys: Sequence[LoRAKey], names: LayerNames, *, network_only: bool) -> list[LoRAKey]:
    """The tensors of the network, all of one adapter."""
    others = [name for name in keys if not name.of_text]
    families = families_of(name.layer for name in others)
    if families and names.family and names.family not in families:
        raise ValueError(f"{file}: this is a LoRA of {' or '.join(families)} and the base is {names.family}")
    refused = [name for name in others if name.refusal]
    if refused:
        # Weights and biases that are named so plainly may be part of another kind of adapter.
        plain = (parse_key("x.weight", names).refusal, parse_key("x", names).refusal)
        worst = next((name for name in refused if name.refusal not in plain), refused[0])
        raise ValueError(f"{file}: tensor {worst.key[:100]!r} is of {worst.refusal}")
    texts = [name.key for name in keys if name.of_text]
    if texts and not network_only:
        raise ValueError(
            f"{file} has tensors of a text_encoder or an embedding too ({texts[0][:100]!r}), and fused adapters share "
            "one embedding of the prompt: --network_only leaves them out, which changes what the LoRA does"
        )
    adapters = {name.adapter or "" for name in others if name.kind != ALPHA}
    if len(adapters) > 1:
        listed = ", ".join(repr(name) for name in sorted(adapters))
        raise ValueError(f"{file} holds several adapters, {listed}; save each of them to a separate file")
    return others


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
    beside = file.parent / PEFT_CONFIG
    if not beside.is_file() or not any(PEFT_PREFIX in name.key for name in names):
        return None
    values = read_json(beside, "the configuration peft saves beside the weights")
    config = {key: value for key, value in values.items() if value}
    check_config(beside, config)
    return config


def _check_wrapped(file: Path, found: Found) -> None:
    """Check that weights as peft alone writes them, which come without its configuration, state their alpha."""
    for kinds in found.values():
        key = kinds[DOWN].key
        if key.startswith(PEFT_PREFIX) and ALPHA not in kinds:
            raise ValueError(
                f"no {PEFT_CONFIG} in {file.parent}; {key[:100]!r} has peft's wrapper {PEFT_PREFIX}, and peft writes "
                "alpha to that file: put it beside the weights"
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
