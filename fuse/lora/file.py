"""LoRA files as anybody may have written them: nothing of one is believed before it was looked at.

    W x  →  W x + (alpha / r) B A x          (LoRA, arXiv:2106.09685; with rsLoRA alpha / √r, arXiv:2312.03732)

Keys are those that stepfuse writes (`stepfuse.fuse.lora.keys.written_key`), or diffusers' and peft's plain ones,
`PART.MODULE.lora_A.weight`, PART one of `PARTS`; for files in other layouts see `stepfuse.fuse.lora.convert`.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepfuse.fuse.lora.keys import BIAS, DOWN, MAGNITUDE, PARTS, UP, parse_key, set_key, written_key
from stepfuse.fuse.lora.safe_files import one_line, short

METADATA = "lora_adapter_metadata"  # diffusers' name for peft's configuration in a file's header
MOST_BYTES = 2**33
MOST_HEADER = 2**24
MOST_ELEMENTS = 2**27  # of one tensor: rank 512 on the widest layer of SDXL has 2**23
DTYPES = ("F64", "F32", "F16", "BF16")
SMALL_DTYPES = ("F8_E4M3", "F8_E5M2")  # of files that were converted to save space; an import takes them
WHOLE = ("I64", "I32", "I16", "I8", "U8")  # some write alphas so
# Of peft's configuration: what has no part in a forward of the trained adapter.
IDLE = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
KNOWN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "peft_type")
# They change the base before training, so that the adapter is of another one.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
        bias: B has one.
    """

    rank: int
    inputs: tuple[int, ...]
    outputs: int
    alpha: float
    scaling: float
    dora: bool = False
    bias: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer it is of."""
        return (self.outputs, *self.inputs)


@dataclass(frozen=True, kw_only=True)
class LoRAFile:
    """A file whose header was checked; its tensors stay where they are.

    Attributes:
        file: where it lies.
        layers: by part, then by the module's path.
        rslora: by part, whether alpha is divided by √r.
        keys: of the tensors in the file, by their names in peft's layout, `PART.MODULE.lora_A.weight`.
    """

    file: Path
    layers: Mapping[str, Mapping[str, LoRALayer]]
    rslora: Mapping[str, bool]
    keys: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(layer.rank for part in self.layers.values() for layer in part.values())

    @property
    def as_written(self) -> bool:
        """The file is in the layout that stepfuse writes: its keys, and scaling 1 in every layer."""
        unet = self.layers.get("unet", {})
        guarded = any(layer.dora or layer.bias for layer in unet.values())
        kinds = {DOWN, UP, BIAS, MAGNITUDE}
        names = {f"unet.{m}.{kind}": written_key(m, kind, guarded=guarded) for m in unet for kind in kinds}
        return (
            all(name in names and key == f"unet.{names[name]}" for name, key in self.keys.items())
            and all(layer.scaling == 1 for layer in unet.values())
            and not any(self.rslora.values())
        )

    def read(self, sha256: str | None = None) -> dict[str, Tensor]:
        """Its tensors under their names in peft's layout; with a hash, those of exactly that file.

        Raises:
            ValueError: for another hash, or a file that changed since its header was read.
        """
        content = self.file.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{self.file} is not the file that was recorded (sha256 differs); fetch it again")
        try:
            state = safetensors.torch.load(content)
        except SafetensorError as error:
            raise ValueError(f"{self.file} is truncated or no safetensors file ({error}); fetch it again") from error
        if state.keys() != set(self.keys.values()):
            raise ValueError(f"{self.file} changed while it was read; try again")
        return {name: state[key] for name, key in self.keys.items()}

    def config(self, part: str) -> dict[str, Any]:
        """peft's configuration of one part, made of what was checked and of nothing else in the file."""
        layers = self.layers[part]
        (rank, _), (alpha, _) = (
            Counter(values).most_common(1)[0]
            for values in ([layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()])
        )
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != rank},
            "alpha_pattern": {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
            "target_modules": sorted(layers),
            "use_rslora": self.rslora[part],
            "use_dora": any(layer.dora for layer in layers.values()),
            "lora_bias": any(layer.bias for layer in layers.values()),
        }


def open_lora(file: Path) -> LoRAFile:
    """Read and check the header of a LoRA file; no tensor is read.

    Raises:
        ValueError: for a file that is truncated, no safetensors file or no LoRA, tensors that do not go together or
            are absurdly large, and configurations that compute something else than a LoRA.
    """
    if not file.is_file():
        raise ValueError(f"no LoRA weights at {file}")
    shapes, metadata = read_header(file)
    found: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    keys: dict[str, str] = {}
    for key, shape in shapes.items():
        split = set_key(key)
        if split is None:
            what = parse_key(key).refusal or "a LoRA in another layout; `stepfuse set import` takes other layouts"
            raise ValueError(f"{file}: tensor {key[:100]!r} is of {what}")
        part, module, kind = split
        name = ".".join(split)
        if name in keys:
            raise ValueError(f"{file}: tensors {keys[name][:100]!r} and {key[:100]!r} are of the same layer and factor")
        keys[name] = key
        found.setdefault(part, {}).setdefault(module, {})[kind] = shape
    configs = read_configs(file, metadata)
    for part in configs.keys() - found.keys():
        raise ValueError(f"{file}: its metadata is of {part}, and it has no tensors of that; fetch it again")
    layers = {part: check_layers(file, part, modules, configs.get(part)) for part, modules in found.items()}
    rslora = {part: bool(configs.get(part, {}).get("use_rslora", False)) for part in layers}
    return LoRAFile(file=file, layers=layers, rslora=rslora, keys=keys)


def check_layers(
    file: Path,
    part: str,
    modules: Mapping[str, Mapping[str, tuple[int, ...]]],
    config: Mapping[str, Any] | None,
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
    placed = None if config is None else {**config, **_placed(config)}
    layers = {name: _layer(file, f"{part}.{name}", own, placed) for name, own in modules.items()}
    for what in ("dora", "bias"):
        if len({getattr(layer, what) for layer in layers.values()}) > 1:
            raise ValueError(f"{file}: some layers of {part} have a {what} and others none; expected one or the other")
    return layers


def read_header(
    file: Path, relevant: Callable[[str], bool] = lambda key: True, *, dtypes: tuple[str, ...] = DTYPES
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and the metadata, of a safetensors file of floating-point numbers.

    Args:
        relevant: whether a tensor of that key will be read; sizes and types of others are not checked.
        dtypes: types that tensors may have, by their names in safetensors.

    Raises:
        ValueError: for what is none, is too large to be a LoRA, or is shorter or longer than its header says.
    """
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{file} has {size:,} bytes; a LoRA has {MOST_BYTES:,} at most")
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    if size >= 8 and length > min(MOST_HEADER, size - 8):
        raise ValueError(f"{file} is truncated or no safetensors file (a header of {length:,} bytes); fetch it again")
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            shapes = {key: tuple(own.get_shape()) for key, own in slices.items()}
            stored = {key: own.get_dtype() for key, own in slices.items()}
            metadata = dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({one_line(error)}); fetch it again") from error
    if not shapes:
        raise ValueError(f"{file} holds no tensors; train the adapter again")
    for key, shape in shapes.items():
        if not relevant(key):
            continue
        if math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"{file}: tensor {key[:100]!r} of shape {list(shape)} is too large for a LoRA")
        if stored[key] not in dtypes and not (key.endswith("alpha") and stored[key] in WHOLE):
            raise ValueError(f"{file}: tensor {key[:100]!r} is {stored[key]}; expected one of {', '.join(dtypes)}")
    return shapes, metadata


def check_finite(file: Path) -> None:
    """See that every number of a file is one, a tensor at a time.

    Raises:
        ValueError: naming the file and the tensor at fault.
    """
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if not bool(torch.isfinite(tensors.get_tensor(key)).all()):
                raise ValueError(f"{file}: tensor {key} has values that are not finite; train the adapter again")


class OfLayer(Protocol):
    """A LoRA of one layer, its values with it or not."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it is added to."""
        ...


def check_fits(file: Path, layers: Mapping[str, OfLayer], model: nn.Module) -> None:
    """See that layers are linear ones or convolutions of a model, and of their shapes, before tensors are put on it.

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


def _layer(file: Path, name: str, own: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None) -> LoRALayer:
    """One layer, of the shapes of its tensors."""
    down, up = own.get("lora_A.weight"), own.get("lora_B.weight")
    if down is None or up is None:
        raise ValueError(f"{file}: {name} has lora_{'B' if down is None else 'A'} alone; fetch the file again")
    fits = len(down) == len(up) and len(down) in (2, 4) and up[1] == down[0] and all(n == 1 for n in up[2:])
    if not fits or 0 in (*down, *up):
        raise ValueError(f"{file}: {name} has A of shape {list(down)} and B of {list(up)}, which do not go together")
    outputs, rank = up[0], down[0]
    magnitude, bias = own.get("lora_magnitude_vector"), own.get("lora_B.bias")
    for what, shape in (("magnitude", magnitude), ("bias", bias)):
        # peft's magnitude of a convolution has its weight's four dimensions.
        wide = what == "magnitude" and len(down) == 4
        if shape is not None and shape != ((1, outputs, 1, 1) if wide else (outputs,)):
            raise ValueError(f"{file}: {name} has a {what} of shape {list(shape)} and {outputs} outputs")
    alpha, rslora = float(rank), False
    if config is not None:
        module = name.partition(".")[2]
        stated = _of_pattern(config["rank_pattern"], module, config.get("r", rank))
        if stated != rank:
            raise ValueError(f"{file}: {name} has rank {rank}, and the metadata says {stated}")
        alpha = float(_of_pattern(config["alpha_pattern"], module, config.get("lora_alpha", rank)))
        rslora = bool(config.get("use_rslora", False))
        for what, there in (("use_dora", magnitude), ("lora_bias", bias)):
            if bool(config.get(what, False)) != (there is not None):
                raise ValueError(f"{file}: the metadata says {what} {short(config.get(what))}, and {name} is otherwise")
    return LoRALayer(
        rank=rank,
        inputs=down[1:],
        outputs=outputs,
        alpha=alpha,
        scaling=alpha / (math.sqrt(rank) if rslora else rank),
        dora=magnitude is not None,
        bias=bias is not None,
    )


def _placed(config: Mapping[str, Any]) -> dict[str, Any]:
    """peft's patterns with the place of each name in them: then a module's is found without a look at all."""
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    return {
        name: {_plain_name(key): (place, value) for place, (key, value) in enumerate(pattern.items())}
        for name, pattern in patterns.items()
    }


def _plain_name(pattern: str) -> str:
    """A name that is written as a regular expression, without its escaped dots and the end that peft adds anyway."""
    return pattern.replace("\\.", ".").removesuffix("$")


def _of_pattern(pattern: Mapping[str, tuple[int, Any]], module: str, default: Any) -> Any:
    """A module's value in one of peft's patterns, the first whose name ends the module's path.

    peft takes the names for regular expressions; here they are names, which cannot take for ever.
    """
    parts = module.split(".")
    names = {"^" + module} | {".".join(parts[i:]) for i in range(len(parts))}
    return min((pattern[name] for name in names if name in pattern), default=(0, default))[1]


def read_configs(
    file: Path, metadata: Mapping[str, str], parts: tuple[str, ...] = PARTS, *, bare: bool = False
) -> dict[str, dict[str, Any]]:
    """peft's configuration by part, where the header has one.

    Args:
        parts: those that are of interest; the configurations of others are not looked at.
        bare: settings without a part are the UNet's, as `UNet2DConditionModel.save_lora_adapter` writes them.

    Raises:
        ValueError: for metadata that is malformed, or of something else than a LoRA.
    """
    if METADATA not in metadata:
        return {}
    try:
        packed = json.loads(metadata[METADATA])
        if not isinstance(packed, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata is malformed: {error}") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in packed.items():
        part, _, name = key.partition(".")
        if bare and not name:
            part, name = "unet", part
        if part not in PARTS or not name:
            raise ValueError(
                f"{file}: its metadata has {key[:100]!r}; expected keys that begin with {', '.join(PARTS)}"
            )
        if part in parts:
            configs.setdefault(part, {})[name] = value
    for config in configs.values():
        check_config(file, config)
    return configs


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """See that a configuration of peft's is of a plain LoRA, rsLoRA or DoRA, and of the types it should have.

    Raises:
        ValueError: naming the setting at fault.
    """

    def positive(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31

    for name in ("r", "lora_alpha"):
        if name in config and not positive(config[name]):
            raise ValueError(f"{file}: its metadata has {name} {short(config[name])}; expected a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(positive(value) for value in pattern.values()):
            raise ValueError(f"{file}: its metadata has {name} {short(pattern)}; expected numbers by module")
        for key in pattern:
            if not re.fullmatch(r"\^?[A-Za-z0-9_.]+", _plain_name(key)):
                raise ValueError(
                    f"{file}: its metadata has {name} of {short(key)}; expected the names of modules, and no other "
                    "regular expressions"
                )
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file} is a {short(config['peft_type'])} of peft; expected a LoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file} has trained biases of the base (bias {short(config['bias'])}), which are no LoRA")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise ValueError(f"{file} was begun as {short(begun)}, which changes the base; convert it to a plain LoRA")
    for name, value in config.items():
        if name not in (*IDLE, *KNOWN) and value:
            raise ValueError(f"{file}: its metadata has {short(name)} {short(value)}, which is not known here")


def check_parts(lora: LoRAFile) -> None:
    """See that a file is of the UNet alone.

    Raises:
        ValueError: for parts of text encoders.
    """
    if others := [part for part in lora.layers if part != "unet"]:
        raise ValueError(
            f"{lora.file} is of the {others[0]} too; fused adapters share one embedding of the prompt, so they can "
            "be of the UNet only: `stepfuse set import --unet_only` leaves the rest out, which changes what it does"
        )
