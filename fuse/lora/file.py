"""Untrusted LoRA files: the header is checked before a tensor is read, and against the network before it is loaded.

    W x  →  W x + (alpha / r) B A x          (LoRA, arXiv:2106.09685; with rsLoRA alpha / √r, arXiv:2312.03732)

Keys are those that stepfuse writes (`stepfuse.fuse.lora.keys.written_key`), or diffusers' and peft's plain ones,
`PART.MODULE.lora_A.weight`, PART the name of a network or one of `TEXT_PARTS`; for files in other layouts see
`stepfuse.fuse.lora.convert`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stepfuse.data.text_files import short_repr
from stepfuse.fuse.lora.config import Patterns, read_config
from stepfuse.fuse.lora.factors import Factors, written_state
from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, TEXT_PARTS, UP, parse_key, set_key
from stepfuse.fuse.lora.names import LayerNames
from stepfuse.fuse.lora.tensor_file import TensorFile, open_tensors

Shapes = Mapping[str, tuple[int, ...]]  # of a layer's tensors, by their kind


@dataclass(frozen=True, kw_only=True)
class LoRAFile:
    """An open file whose header was checked.

    Attributes:
        tensors: of the file.
        part: the pipeline's name of the network.
        layers: by the module's path; their tensors are meta tensors.
        keys: of the tensors in the file, by part, module and kind.
    """

    tensors: TensorFile
    part: str
    layers: Mapping[str, Factors]
    keys: Mapping[tuple[str, str, str], str]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def as_written(self) -> bool:
        """The file is in the layout that stepfuse writes: its keys, and scaling 1 in every layer."""
        keys = written_state(self.layers, self.part).keys()
        return keys == set(self.keys.values()) and all(layer.scaling == 1 for layer in self.layers.values())

    def factors(self, sha256: str | None = None) -> dict[str, Factors]:
        """The layers with their values, finite and, with a hash, of exactly that file; a ValueError otherwise."""
        state = self.tensors.read(sha256)
        return {
            module: Factors.of({kind: state[self.keys[self.part, module, kind]] for kind in layer.tensors}, layer.alpha)
            for module, layer in self.layers.items()
        }


@contextmanager
def open_lora(file: Path, networks: Sequence[str]) -> Iterator[LoRAFile]:
    """Open a LoRA file and check its header; no tensor is read.

    Args:
        networks: names of networks that it may be of.

    Raises:
        ValueError: for a file that is truncated, no safetensors file or no LoRA, tensors that do not go together or
            are absurdly large, configurations that compute something else than a LoRA, and parts of text encoders.
    """
    with open_tensors(file) as tensors:
        keys: dict[tuple[str, str, str], str] = {}
        for key in tensors.tensors:
            split = set_key(key, networks)
            if split is None:
                refusal = parse_key(key, LayerNames.of(networks[0])).refusal
                what = refusal or "a LoRA in another layout; `stepfuse set import` takes other layouts"
                raise ValueError(f"{file}: tensor {key[:100]!r} is of {what}")
            if split in keys:
                both = f"{keys[split][:100]!r} and {key[:100]!r}"
                raise ValueError(f"{file}: tensors {both} are of the same layer and factor")
            keys[split] = key
        parts = dict.fromkeys(part for part, _, _ in keys)
        network = next((part for part in parts if part not in TEXT_PARTS), "")
        if others := [part for part in parts if part != network]:
            raise ValueError(
                f"{file} is of the {others[0]} too; fused adapters share one embedding of the prompt, so they can be "
                "of the network only: `stepfuse set import --network_only` leaves the rest out, which changes it"
            )
        config = read_config(file, tensors.metadata, network)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for (_, module, kind), key in keys.items():
            shapes.setdefault(module, {})[kind] = tensors.tensors[key].shape
        layers = check_layers(file, network, shapes, config)
        yield LoRAFile(tensors=tensors, part=network, layers=layers, keys=keys)


def check_layers(
    file: Path, part: str, modules: Mapping[str, Shapes], config: Mapping[str, Any] | None
) -> dict[str, Factors]:
    """Layers of meta tensors, from the shapes of their tensors and peft's configuration.

    Args:
        file, part: named in errors.
        modules: shapes by kind of tensor, by the module's path.
        config: peft's; without one alpha is the rank.

    Raises:
        ValueError: for tensors that do not go together or that the configuration contradicts.
    """
    patterns = None if config is None else Patterns(config)
    layers = {module: _layer(file, part, module, shapes, patterns) for module, shapes in modules.items()}
    found = {"dora": [layer.dora for layer in layers.values()], "bias": [layer.has_bias for layer in layers.values()]}
    for what, some in found.items():
        if any(some) and not all(some):
            raise ValueError(f"{file}: some layers of {part} have a {what} and others none; expected one or the other")
    return layers


def check_fits(file: Path, layers: Mapping[str, Factors], model: nn.Module) -> None:
    """Raise ValueError, naming the layer, unless a LoRA's layers are linear ones or convolutions of a model."""
    check_shapes(file, layers, dict(plain_modules(model)))


def check_shapes(file: Path, layers: Mapping[str, Factors], modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, naming the layer, unless a LoRA's layers are linear ones or convolutions among modules."""
    for name, layer in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"{file}: the base has no layer {name[:100]!r} that is linear or a convolution; the LoRA is of another "
                "base"
            )
        if layer.shape != tuple(module.weight.shape):
            raise ValueError(
                f"{file}: the LoRA of {name} is of a layer of shape {list(layer.shape)}, and the base's has "
                f"{list(module.weight.shape)}; the LoRA is of another base"
            )


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules under their names without LoRAs."""
    for name, module in model.named_modules():
        if ".base_layer" not in name and ".lora_" not in name:
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _layer(file: Path, part: str, module: str, shapes: Shapes, patterns: Patterns | None) -> Factors:
    name = f"{part}.{module}"
    down, up = shapes.get(DOWN), shapes.get(UP)
    if down is None or up is None:
        raise ValueError(f"{file}: {name} has lora_{'B' if down is None else 'A'} alone; fetch the file again")
    fits = len(down) == len(up) and len(down) in (2, 4) and up[1] == down[0] and all(n == 1 for n in up[2:])
    if not fits or 0 in (*down, *up):
        raise ValueError(f"{file}: {name} has A of shape {list(down)} and B of {list(up)}, which do not go together")
    outputs, rank, alpha = up[0], down[0], float(down[0])
    if patterns is not None:
        if (stated := patterns.rank(module, rank)) != rank:
            raise ValueError(f"{file}: {name} has rank {rank}, and the metadata says {stated}")
        alpha = patterns.alpha(module, rank) * (math.sqrt(rank) if patterns.config.get("use_rslora") else 1)
    # peft's magnitude of a convolution has its weight's four dimensions.
    magnitude = (1, outputs, 1, 1) if len(down) == 4 else (outputs,)
    for what, setting, shape, expected in (
        ("magnitude", "use_dora", shapes.get(MAGNITUDE), magnitude),
        ("bias", "lora_bias", shapes.get(BIAS), (outputs,)),
    ):
        if shape not in (None, expected):
            raise ValueError(f"{file}: {name} has a {what} of shape {list(shape)} and {outputs} outputs")
        if patterns is not None and bool(stated := patterns.config.get(setting)) != (shape is not None):
            raise ValueError(
                f"{file}: the metadata says {setting} {short_repr(stated)}, and the tensors of {name} do not"
            )
    return Factors.of({kind: torch.empty(shape, device="meta") for kind, shape in shapes.items()}, alpha)
