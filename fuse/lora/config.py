"""peft's configuration of LoRAs: made of layers, and read from what anybody may have written."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stepfuse.data.json_file import parse_json
from stepfuse.data.text_files import short_repr
from stepfuse.fuse.lora.keys import TEXT_PARTS

METADATA = "lora_adapter_metadata"  # diffusers' name for peft's configuration in a file's header
USED_SETTINGS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "peft_type"),
)
# Settings that have no part in a forward of the trained adapter.
UNUSED_SETTINGS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type"),
)
# Initialisations that change the base before training, so that the adapter is of another one.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Layer(Protocol):
    """The LoRA of one layer, its values with it or not; `shape` is that of the weight it is added to."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dora(self) -> bool: ...
    @property
    def has_bias(self) -> bool: ...


def layer_settings(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """peft's settings of layers by the module's path: the usual rank and alpha, and patterns for the others."""
    rank, alpha = (
        Counter(values).most_common(1)[0][0]
        for values in ([layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()])
    )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "target_modules": sorted(layers),
        "use_dora": any(layer.dora for layer in layers.values()),
        "lora_bias": any(layer.has_bias for layer in layers.values()),
    }


def read_configs(
    file: Path, metadata: Mapping[str, str], parts: Sequence[str], *, bare: str = ""
) -> dict[str, dict[str, Any]]:
    """peft's configuration by part, where the header has one.

    Args:
        parts: of the pipeline; the configurations of text encoders that are not among them are not looked at.
        bare: the part of settings without one, as `save_lora_adapter` of a network writes them.

    Raises:
        ValueError: for metadata that is malformed, or of something else than a LoRA.
    """
    if METADATA not in metadata:
        return {}
    try:
        settings = parse_json(metadata[METADATA].encode())
        if not isinstance(settings, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{file}: its metadata is malformed: {error}") from error
    known = tuple(dict.fromkeys((*parts, *TEXT_PARTS)))
    configs: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        part, _, name = key.partition(".")
        if bare and not name:
            part, name = bare, part
        if part not in known or not name:
            raise ValueError(
                f"{file}: its metadata has {key[:100]!r}; expected keys that begin with {', '.join(known)}"
            )
        if part in parts:
            configs.setdefault(part, {})[name] = value
    for config in configs.values():
        check_config(file, config)
    return configs


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Check that a configuration of peft's is of a plain LoRA, rsLoRA or DoRA, and of the types it should have.

    Raises:
        ValueError: naming the setting at fault.
    """

    def positive(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31

    for name in ("r", "lora_alpha"):
        if name in config and not positive(config[name]):
            raise ValueError(f"{file}: its metadata has {name} {short_repr(config[name])}; expected a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(positive(value) for value in pattern.values()):
            raise ValueError(f"{file}: its metadata has {name} {short_repr(pattern)}; expected numbers by module")
        for key in pattern:
            if not re.fullmatch(r"\^?[A-Za-z0-9_.]+", plain_name(key)):
                raise ValueError(
                    f"{file}: its metadata has {name} of {short_repr(key)}; expected the names of modules, and no "
                    "other regular expressions"
                )
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file} is a {short_repr(config['peft_type'])} of peft; expected a LoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file} has trained biases of the base (bias {short_repr(config['bias'])}); expected none")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{file} was initialised as {short_repr(initial)}, which changes the base; convert it to a plain LoRA"
        )
    for name, value in config.items():
        if name not in (*USED_SETTINGS, *UNUSED_SETTINGS) and value:
            raise ValueError(f"{file}: its metadata has {short_repr(name)} {short_repr(value)}, which is not supported")


class Patterns:
    """Rank and alpha of modules by a checked configuration of peft's.

    peft takes the names in its patterns for regular expressions; here they are names, looked up without a search, so
    that none can take for ever.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        patterns = {name: (config.get(name) or {}).items() for name in ("rank_pattern", "alpha_pattern")}
        self._patterns = {
            # Reversed, so that of two spellings of one name the first counts, as in peft.
            name: {plain_name(key): (index, value) for index, (key, value) in reversed(list(enumerate(pattern)))}
            for name, pattern in patterns.items()
        }

    def rank(self, module: str, default: int) -> Any:
        return self._first("rank_pattern", module, self.config.get("r", default))

    def alpha(self, module: str, default: int) -> float:
        return float(self._first("alpha_pattern", module, self.config.get("lora_alpha", default)))

    def _first(self, name: str, module: str, default: Any) -> Any:
        """The value of the first name in a pattern that ends the module's path."""
        pattern, parts = self._patterns[name], module.split(".")
        names = {"^" + module} | {".".join(parts[i:]) for i in range(len(parts))}
        return min((pattern[name] for name in names if name in pattern), default=(0, default))[1]


def plain_name(pattern: str) -> str:
    """A name that is written as a regular expression, without its escaped dots and the end that peft adds anyway."""
    return pattern.replace("\\.", ".").removesuffix("$")
