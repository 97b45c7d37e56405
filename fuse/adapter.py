"""One aligned adapter: its LoRA, its objective and how it came to be, as a folder.

FOLDER/
  pytorch_lora_weights.safetensors   the LoRA, as `pipe.load_lora_weights` reads it
  objective.json                     name, reward, beta, variance schedule, guidance, base, record
"""

import hashlib
import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepfuse.fuse.pipeline import same_base
from stepfuse.fuse.variance import VarianceSchedule, schedule_from_dict, schedule_to_dict
from stepfuse.rewards.shaping import Shaping

FORMAT_VERSION = 1
WEIGHTS = "pytorch_lora_weights.safetensors"
OBJECTIVE = "objective.json"
GUIDANCE = ("shared", "full", "off")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What one adapter was aligned to.

    Attributes:
        name: how users call it in their weights; letters, digits, `_` and `-`.
        reward: the reward's name.
        variance: the schedule it was trained with, and is fused with.
        beta: temperature of its KL to the base, in units of the shaped reward; 0 where its training had none.
        shaping: what its reward went through before anything learnt from it.

    Raises:
        ValueError: for a name that cannot serve as one, or a beta below 0.
    """

    name: str
    reward: str
    variance: VarianceSchedule
    beta: float
    shaping: Shaping = field(default_factory=Shaping)

    @property
    def temperature(self) -> float:
        """Its beta in units of the raw reward: r/scale at beta is r at beta · scale.

        Exact for the optimum of E[r/scale] - beta KL. Training by normalised advantages or by pairs does not see the
        scale, which then says in which unit beta is meant; `fit_reward` makes it the reward's deviation.
        """
        return self.beta * self.shaping.scale

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"objective name {self.name!r}; expected letters, digits, '_' and '-'")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"objective {self.name!r} has beta {self.beta}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder, read and checked; the weights stay on disk until a pipeline loads them.

    Attributes:
        folder: where it lies.
        objective: what it was aligned to.
        base: `name_or_path` and the fingerprint of the base it belongs to.
        guidance: `shared`, `full` or `off`, as it was trained.
        guidance_scale: g of that guidance.
        num_inference_steps: denoising steps of its training.
        sha256: hash of the weights file.
        record: algorithm, reward before and after, KL spent, configuration, versions.
    """

    folder: Path
    objective: Objective
    base: dict[str, Any]
    guidance: str
    guidance_scale: float
    num_inference_steps: int
    sha256: str
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.objective.name


def write_adapter(
    folder: Path,
    unet: nn.Module,
    objective: Objective,
    *,
    state: dict[str, Tensor] | None = None,
    base: dict[str, Any],
    guidance: str,
    guidance_scale: float,
    num_inference_steps: int,
    record: dict[str, Any],
    pipeline_class: type[DiffusionPipeline],
) -> Adapter:
    """Save the adapter named `objective.name` of `unet` into a folder; `objective.json` comes last.

    Args:
        state: its tensors in peft's names, whole; by default as they are on the UNet.

    Raises:
        ValueError: for tensors that are empty or not finite: nothing is written then.
    """
    state = get_peft_model_state_dict(unet, adapter_name=objective.name) if state is None else state
    for name, value in state.items():
        if value.numel() == 0 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"adapter {objective.name!r}: {name} is empty or not finite; it is not saved")
    folder.mkdir(parents=True, exist_ok=True)
    # In peft's key names throughout: diffusers' older names exist for attention only, and of a file
    # that mixes both, `load_lora_weights` drops one kind.
    pipeline_class.save_lora_weights(
        folder,
        unet_lora_layers={k: v.detach().float().contiguous().cpu() for k, v in state.items()},
        unet_lora_adapter_metadata=cast(Any, unet).peft_config[objective.name].to_dict(),
    )
    _sort_metadata(folder / WEIGHTS)
    values = {
        "format_version": FORMAT_VERSION,
        "name": objective.name,
        "reward": objective.reward,
        "beta": objective.beta,
        "shaping": asdict(objective.shaping),
        "variance": schedule_to_dict(objective.variance),
        "guidance": guidance,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "base": base,
        "sha256": file_hash(folder / WEIGHTS),
        "record": record,
    }
    write_json(folder / OBJECTIVE, values)
    return read_adapter(folder)


def _sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata in order, which the library leaves to chance: one adapter, one hash."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    aside = file.with_name(file.name + ".tmp")
    aside.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    aside.replace(file)


def copy_adapter(adapter: Adapter, folder: Path, *, half: bool = False) -> None:
    """Copy an adapter's files; with `half` its weights in float16, metadata kept and the hash written anew."""
    if not half:
        for name in (WEIGHTS, OBJECTIVE):
            shutil.copyfile(adapter.folder / name, folder / name)
        return
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as tensors:
        weights = {key: tensors.get_tensor(key).half() for key in tensors.keys()}  # noqa: SIM118
        save_file(weights, folder / WEIGHTS, metadata=tensors.metadata())
    check_weights(folder / WEIGHTS)  # what float16 cannot hold became infinite
    values = read_json(adapter.folder / OBJECTIVE, "an adapter folder, as training leaves it")
    write_json(folder / OBJECTIVE, values | {"sha256": file_hash(folder / WEIGHTS)})


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder.

    Raises:
        ValueError: for a missing or malformed file, weights that are truncated, not finite, or not those recorded.
    """
    folder = Path(folder)
    values = read_json(folder / OBJECTIVE, "an adapter folder, as training leaves it")
    file = folder / OBJECTIVE
    try:
        adapter = Adapter(
            folder=folder,
            objective=Objective(
                name=values["name"],
                reward=values["reward"],
                variance=schedule_from_dict(values["variance"]),
                beta=float(values["beta"]),
                shaping=Shaping(**values.get("shaping", {})),
            ),
            base=check_base(values["base"]),
            guidance=check_guidance(values["guidance"]),
            guidance_scale=float(values["guidance_scale"]),
            num_inference_steps=check_steps(values["num_inference_steps"]),
            sha256=values["sha256"],
            record=_check_record(values.get("record", {})),
        )
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; train or create the adapter again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    check_weights(folder / WEIGHTS)
    if file_hash(folder / WEIGHTS) != adapter.sha256:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {OBJECTIVE} records (sha256 differs); fetch it again"
        )
    return adapter


def check_base(base: Any) -> dict[str, Any]:
    keys = ("name_or_path", "architecture", "probe")
    if not isinstance(base, dict) or any(key not in base for key in keys) or not isinstance(base["probe"], list):
        raise ValueError(f"base {base!r}; expected {', '.join(keys)}")
    return base


def check_guidance(guidance: Any) -> str:
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance {guidance!r}; expected one of {', '.join(GUIDANCE)}")
    return guidance


def check_steps(count: Any) -> int:
    if int(count) < 1:
        raise ValueError(f"num_inference_steps {count!r}; expected 1 or more")
    return int(count)


def _check_record(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"record {record!r}; expected an object")
    return record


def check_weights(file: Path) -> None:
    """Open a safetensors file and see that every tensor is whole and finite.

    Raises:
        ValueError: naming the file, and the tensor where one is at fault.
    """
    if not file.is_file():
        raise ValueError(f"no LoRA weights at {file}")
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                if not bool(torch.isfinite(tensors.get_tensor(name)).all()):
                    raise ValueError(f"{file}: tensor {name} has values that are not finite; train the adapter again")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
    if not names:
        raise ValueError(f"{file} holds no tensors; train the adapter again")


def load_adapter(pipeline: DiffusionPipeline, adapter: Adapter, fingerprint: dict[str, Any]) -> None:
    """Put an adapter on the pipeline's UNet under its objective's name, and verify that every tensor arrived.

    Raises:
        ValueError: for an adapter of another base, or weights that did not all load.
    """
    if not same_base(adapter.base, fingerprint):
        raise ValueError(
            f"adapter {adapter.name!r} in {adapter.folder} was trained on another base, "
            f"{adapter.base.get('name_or_path')!r}; load that one"
        )
    with warnings.catch_warnings():
        # peft warns of a second adapter on one model: that is what a set is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        pipeline.load_lora_weights(adapter.folder, weight_name=WEIGHTS, adapter_name=adapter.name)
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name=adapter.name)
    file = adapter.folder / WEIGHTS
    with safe_open(file, framework="pt") as tensors:
        stored = {key.removeprefix("unet."): tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    given = convert_unet_state_dict_to_peft(stored)  # files from elsewhere may hold the older names
    for key in given.keys() | loaded.keys():
        if (
            key not in given
            or key not in loaded
            or not torch.equal(loaded[key].cpu(), given[key].to(loaded[key].dtype))
        ):
            raise ValueError(f"{file}: LoRA tensor {key} did not load into the base {adapter.base['name_or_path']!r}")


def file_hash(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write aside and rename: a reader never sees half a file."""
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    aside.replace(file)


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object of the current format version.

    Raises:
        ValueError: naming the file.
    """
    if not file.is_file():
        raise ValueError(f"no {file.name} in {file.parent}; expected {what}")
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {values.get('format_version')!r}; this stepfuse reads {FORMAT_VERSION}"
        )
    return values
