"""peft's configuration of LoRAs, read from untrusted files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepfuse.data.json_file import parse_json
from stepfuse.data.text_files import short_repr
from stepfuse.fuse.lora.keys import TEXT_PARTS

METADATA = "lora_adapter_metadata"  # diffusers' name for peft's configuration in a file's header
USED_SETTINGS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "peft_type"),
)
# Settings that do not change a forward of the trained adapter.
UNUSED_SETTINGS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "target_modules", "task_type"),
)
# Initialisations that change the base before training, so that the adapter is of another one.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(
    file: Path, metadata: Mapping[str, str], part: str, *, any_layout: bool = False
) -> dict[str, Any] | None:
    """peft's configuration of a network, where the header has one.

    Args:
        part: the pipeline's name of the network.
        any_layout: settings may have no part, as `save_lora_adapter` of a network writes them, and those of text
            encoders are skipped; by default they are refused.

    Raises:
        ValueError: for metadata that is malformed, of another part, or of something else than a LoRA.
    """
    if METADATA not in metadata:
        return None
    try:
        settings = parse_json(metadata[METADATA].encode())
        if not isinstance(settings, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{file}: its metadata is malformed: {error}") from error
    known, config = (part, *TEXT_PARTS), {}
    for key, value in settings.items():
        of, _, name = key.partition(".")
        if any_layout and not name:
            of, name = part, of
        if of not in known or not name:
            raise ValueError(
                f"{file}: its metadata has {key[:100]!r}; expected keys that begin with {', '.join(known)}"
            )
        if of == part:
            config[name] = value
        elif not any_layout:
            raise ValueError(f"{file}: its metadata is of {of}, and it has no tensors of that; fetch it again")
    check_config(file, config)
    return config or None


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the setting, unless a configuration is of a LoRA, rsLoRA or DoRA and its types are."""

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
            if not re.fullmatch(r"\^?[A-Za-z0-9_.-]+", plain_name(key)):
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
    that no pattern takes long.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._patterns = {}
        for name in ("rank_pattern", "alpha_pattern"):
            entries = list(enumerate((config.get(name) or {}).items()))
            # Reversed, so that of two spellings of one name the first counts, as in peft.
            self._patterns[name] = {plain_name(key): (index, value) for index, (key, value) in reversed(entries)}

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
