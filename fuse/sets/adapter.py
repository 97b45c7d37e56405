"""One aligned adapter: its LoRA, its objective and how it came to be, as a folder.

FOLDER/
  pytorch_lora_weights.safetensors   the LoRA, as `pipe.load_lora_weights` reads it
  objective.json                     name, reward, beta, variance schedule, guidance, base, record
"""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepfuse.data.file_info import file_hash
from stepfuse.data.names import nearest
from stepfuse.fuse.backbones.denoiser import GUIDANCE
from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.lora.factors import read_factors, state_factors
from stepfuse.fuse.lora.file import check_finite, check_fits, check_parts, open_lora
from stepfuse.fuse.lora.load import adapter_state, put_on
from stepfuse.fuse.lora.safe_files import WEIGHTS, write_json
from stepfuse.fuse.lora.write import save_lora, scale_to_one
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_from_dict, schedule_to_dict
from stepfuse.fuse.sets.manifest import FORMAT_VERSION, read_json
from stepfuse.rewards.shaping import Shaping

OBJECTIVE = "objective.json"


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
        gain: of the mean reward over the base, `mean` and the bounds of its 95 % interval `low` and `high`.
        reward_version: of the reward it was trained on.
        license: of its weights, as the hub abbreviates it.
        source: where it came from, if it was not trained here.
        size, rank: of the weights file in bytes, and the largest of its layers', where a manifest says so.
    """

    folder: Path
    objective: Objective
    base: dict[str, Any]
    guidance: str
    guidance_scale: float
    num_inference_steps: int
    sha256: str
    record: dict[str, Any] = field(default_factory=dict)
    gain: dict[str, Any] | None = None
    reward_version: str | None = None
    license: str | None = None
    source: str | None = None
    size: int | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        return self.objective.name


def write_adapter(
    folder: Path,
    unet: nn.Module | None,
    objective: Objective,
    *,
    state: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    base: dict[str, Any],
    guidance: str,
    guidance_scale: float,
    num_inference_steps: int,
    record: dict[str, Any],
    pipeline_class: type[DiffusionPipeline],
    license: str | None = None,
    source: str | None = None,
) -> Adapter:
    """Save the adapter named `objective.name` of `unet` into a folder; `objective.json` comes last.

    Args:
        state, config: its tensors in peft's names, whole, and peft's configuration; by default those on the UNet.
        license, source: see `Adapter`.

    Raises:
        ValueError: for tensors that are empty or not finite: nothing is written then.
    """
    if state is None:
        assert unet is not None
        state = adapter_state(unet, objective.name)
    for name, value in state.items():
        if value.numel() == 0 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"adapter {objective.name!r}: {name} is empty or not finite; it is not saved")
    folder.mkdir(parents=True, exist_ok=True)
    given = config or cast(Any, unet).peft_config[objective.name].to_dict()
    whole = {k: v.detach().float().contiguous().cpu() for k, v in state.items()}
    save_lora(folder / WEIGHTS, state_factors(folder / WEIGHTS, whole, given), pipeline_class)
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
        "license": license,
        "source": source,
    }
    write_json(folder / OBJECTIVE, values)
    return read_adapter(folder)


def copy_weights(adapter: Adapter, folder: Path, *, half: bool = False) -> None:
    """Copy an adapter's weights, in the layout of today; with `half` in float16.

    Raises:
        ValueError: for values that float16 cannot hold.
    """
    lora = open_lora(adapter.folder / WEIGHTS)
    if lora.as_written and not half:
        shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
        return
    factors = {name: scale_to_one(layer) for name, layer in read_factors(lora, adapter.sha256).items()}
    save_lora(folder / WEIGHTS, {name: layer.half() if half else layer for name, layer in factors.items()})
    check_finite(folder / WEIGHTS)  # what float16 cannot hold became infinite


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
            license=values.get("license"),
            source=values.get("source"),
        )
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; train or create the adapter again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    check_adapter(adapter)
    return adapter


def check_adapter(adapter: Adapter) -> None:
    """See that an adapter's file is a whole LoRA of a UNet, of finite numbers, and the one that was recorded.

    Raises:
        ValueError: naming the file.
    """
    file = adapter.folder / WEIGHTS
    if adapter.size is not None and file.is_file() and file.stat().st_size != adapter.size:
        raise ValueError(
            f"{file} is truncated or another file: it has {file.stat().st_size:,} bytes and the manifest says "
            f"{adapter.size:,}; fetch it again"
        )
    lora = open_lora(file)
    if adapter.rank is not None and lora.rank != adapter.rank:
        raise ValueError(f"{file} is of rank {lora.rank}, and the manifest says {adapter.rank}; fetch it again")
    check_parts(lora)
    if file_hash(file) != adapter.sha256:
        raise ValueError(f"{file} is not the file that was recorded (sha256 differs); fetch it again")
    check_finite(file)


def check_base(base: Any) -> dict[str, Any]:
    keys = ("name_or_path", "architecture", "probe")
    if not isinstance(base, dict) or any(key not in base for key in keys) or not _numbers(base["probe"]):
        raise ValueError(f"base {base!r}; expected {', '.join(keys)}")
    return base


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def check_guidance(guidance: Any) -> str:
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance {guidance!r}; expected one of {', '.join(GUIDANCE)}{nearest(guidance, GUIDANCE)}")
    return guidance


def check_steps(count: Any) -> int:
    if int(count) < 1:
        raise ValueError(f"num_inference_steps {count!r}; expected 1 or more")
    return int(count)


def _check_record(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or not isinstance(record.get("validation") or {}, dict):
        raise ValueError(f"record {record!r}; expected an object")
    return record


def load_adapter(pipeline: DiffusionPipeline, adapter: Adapter, fingerprint: dict[str, Any]) -> None:
    """Put an adapter on the pipeline's UNet under its objective's name, and verify that every tensor arrived.

    The header is checked against the UNet before a tensor is read, and the tensors are those of the recorded hash.

    Raises:
        ValueError: for an adapter of another base, or with a part that is not of the UNet, and for weights that are not
            those recorded or did not all load.
    """
    if not same_base(adapter.base, fingerprint):
        raise ValueError(
            f"adapter {adapter.name!r} in {adapter.folder} was trained on another base, "
            f"{adapter.base.get('name_or_path')!r}; load that one"
        )
    lora = open_lora(adapter.folder / WEIGHTS)
    check_parts(lora)
    check_fits(lora.file, lora.layers["unet"], pipeline.unet)
    put_on(pipeline, adapter.name, lora, lora.read(adapter.sha256))
