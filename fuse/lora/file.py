"""LoRA files as anybody may have written them: nothing of one is believed before it was checked.

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

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepfuse.data.text_files import short_repr
from stepfuse.fuse.lora.config import Layer, Patterns, layer_settings, read_configs
from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, TEXT_PARTS, UP, parse_key, set_key, written_key
from stepfuse.fuse.lora.names import LayerNames
from stepfuse.fuse.lora.tensor_file import TensorFile, open_tensors

Shapes = Mapping[str, tuple[int, ...]]  # of a layer's tensors, by their kind


@dataclass(frozen=True, kw_only=True)
class LoRALayer:
    """The LoRA of one layer, without its values.

    Attributes:
        rank: r.
        inputs: of A without its first dimension: (in,) of a linear layer, (in, k, k) of a convolution.
        outputs: of B.
        alpha: its numerator; `scaling` has rsLoRA's root in it.
        scaling: what B A is multiplied by.
        dora: it has a magnitude (DoRA, arXiv:2402.09353).
        has_bias: B has one.
    """

    rank: int
    inputs: tuple[int, ...]
    outputs: int
    alpha: float
    scaling: float
    dora: bool = False
    has_bias: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is added to."""
        return (self.outputs, *self.inputs)


@dataclass(frozen=True, kw_only=True)
class LoRAFile:
    """An open file whose header was checked.

    Attributes:
        tensors: of the file.
        layers: by part, then by the module's path.
        rslora: by part, whether alpha is divided by √r.
        keys: of the tensors in the file, by their names in peft's layout, `PART.MODULE.lora_A.weight`.
    """

    tensors: TensorFile
    layers: Mapping[str, Mapping[str, LoRALayer]]
    rslora: Mapping[str, bool]
    keys: Mapping[str, str]

    @property
    def file(self) -> Path:
        return self.tensors.file

    @property
    def rank(self) -> int:
        """The largest."""
        return max(layer.rank for part in self.layers.values() for layer in part.values())

    @property
    def part(self) -> str:
        """The part that is the network; empty where the file is of text encoders alone."""
        return next((part for part in self.layers if part not in TEXT_PARTS), "")

    @property
    def as_written(self) -> bool:
        """The file is in the layout that stepfuse writes: its keys, and scaling 1 in every layer."""
        part, layers = self.part, self.layers.get(self.part, {})
        guarded = any(layer.dora or layer.has_bias for layer in layers.values())
        kinds = {DOWN, UP, BIAS, MAGNITUDE}
        names = {f"{part}.{m}.{kind}": written_key(m, kind, guarded=guarded) for m in layers for kind in kinds}
        return (
            all(name in names and key == f"{part}.{names[name]}" for name, key in self.keys.items())
            and all(layer.scaling == 1 for layer in layers.values())
            and not any(self.rslora.values())
        )

    def read(self, sha256: str | None = None) -> dict[str, Tensor]:
        """Its tensors under their names in peft's layout; with a hash, those of exactly that file.

        Raises:
            ValueError: for another hash, and for numbers that are not finite.
        """
        state = self.tensors.read(sha256)
        return {name: state[key] for name, key in self.keys.items()}

    def config(self, part: str) -> dict[str, Any]:
        """peft's configuration of one part, made of what was checked and of nothing else in the file."""
        return layer_settings(self.layers[part]) | {"use_rslora": self.rslora[part]}


@contextmanager
def open_lora(file: Path, networks: Sequence[str]) -> Iterator[LoRAFile]:
    """Open a LoRA file and check its header; no tensor is read.

    Args:
        networks: names of networks that it may be of.

    Raises:
        ValueError: for a file that is truncated, no safetensors file or no LoRA, tensors that do not go together or
            are absurdly large, and configurations that compute something else than a LoRA.
    """
    with open_tensors(file) as tensors:
        shapes: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
        keys: dict[str, str] = {}
        for key, info in tensors.tensors.items():
            split = set_key(key, networks)
            if split is None:
                refusal = parse_key(key, LayerNames.of(networks[0])).refusal
                what = refusal or "a LoRA in another layout; `stepfuse set import` takes other layouts"
                raise ValueError(f"{file}: tensor {key[:100]!r} is of {what}")
            part, module, kind = split
            name = ".".join(split)
            if name in keys:
                both = f"{keys[name][:100]!r} and {key[:100]!r}"
                raise ValueError(f"{file}: tensors {both} are of the same layer and factor")
            keys[name] = key
            shapes.setdefault(part, {}).setdefault(module, {})[kind] = info.shape
        configs = read_configs(file, tensors.metadata, (*networks, *TEXT_PARTS))
        for part in configs.keys() - shapes.keys():
            raise ValueError(f"{file}: its metadata is of {part}, and it has no tensors of that; fetch it again")
        layers = {part: check_layers(file, part, modules, configs.get(part)) for part, modules in shapes.items()}
        rslora = {part: bool(configs.get(part, {}).get("use_rslora", False)) for part in layers}
        yield LoRAFile(tensors=tensors, layers=layers, rslora=rslora, keys=keys)


def check_layers(
    file: Path, part: str, modules: Mapping[str, Shapes], config: Mapping[str, Any] | None
) -> dict[str, LoRALayer]:
    """Layers from the shapes of their tensors and peft's configuration.

    Args:
        file: named in errors.
        part: of the pipeline, named in errors.
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


def check_fits(file: Path, layers: Mapping[str, Layer], model: nn.Module) -> None:
    """Check that layers are linear ones or convolutions of a model, and of their shapes, before tensors are put on it.

    Args:
        layers: by the module's path.

    Raises:
        ValueError: naming the layer at fault.
    """
    modules = dict(plain_modules(model))
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


def check_parts(lora: LoRAFile) -> None:
    """Check that a file is of one network alone.

    Raises:
        ValueError: for parts of text encoders.
    """
    if others := [part for part in lora.layers if part != lora.part]:
        raise ValueError(
            f"{lora.file} is of the {others[0]} too; fused adapters share one embedding of the prompt, so they can "
            "be of the network only: `stepfuse set import --unet_only` leaves the rest out, which changes what it does"
        )


def _layer(file: Path, part: str, module: str, shapes: Shapes, patterns: Patterns | None) -> LoRALayer:
    """One layer, of the shapes of its tensors."""
    name = f"{part}.{module}"
    down, up = shapes.get(DOWN), shapes.get(UP)
    if down is None or up is None:
        raise ValueError(f"{file}: {name} has lora_{'B' if down is None else 'A'} alone; fetch the file again")
    fits = len(down) == len(up) and len(down) in (2, 4) and up[1] == down[0] and all(n == 1 for n in up[2:])
    if not fits or 0 in (*down, *up):
        raise ValueError(f"{file}: {name} has A of shape {list(down)} and B of {list(up)}, which do not go together")
    outputs, rank = up[0], down[0]
    magnitude, bias = shapes.get(MAGNITUDE), shapes.get(BIAS)
    for what, shape in (("magnitude", magnitude), ("bias", bias)):
        # peft's magnitude of a convolution has its weight's four dimensions.
        wide = what == "magnitude" and len(down) == 4
        if shape is not None and shape != ((1, outputs, 1, 1) if wide else (outputs,)):
            raise ValueError(f"{file}: {name} has a {what} of shape {list(shape)} and {outputs} outputs")
    alpha, rslora = float(rank), False
    if patterns is not None:
        config = patterns.config
        if (stated := patterns.rank(module, rank)) != rank:
            raise ValueError(f"{file}: {name} has rank {rank}, and the metadata says {stated}")
        alpha, rslora = patterns.alpha(module, rank), bool(config.get("use_rslora", False))
        for what, shape in (("use_dora", magnitude), ("lora_bias", bias)):
            if bool(config.get(what, False)) != (shape is not None):
                value = short_repr(config.get(what))
                raise ValueError(f"{file}: the metadata says {what} {value}, and the tensors of {name} do not")
    return LoRALayer(
        rank=rank,
        inputs=down[1:],
        outputs=outputs,
        alpha=alpha,
        scaling=alpha / (math.sqrt(rank) if rslora else rank),
        dora=magnitude is not None,
        has_bias=bias is not None,
    )
