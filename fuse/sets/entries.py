"""An adapter and its JSON: `objective.json` in an adapter's folder, and its entry in the manifest of a set.

Both are made of the same parts: an objective, and how the adapter was sampled in its training.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepfuse.data.text_files import short_repr
from stepfuse.fuse.backbones.guidance import check_source
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_from_dict, schedule_to_dict
from stepfuse.fuse.sets.manifest import check_path_in_set
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.rewards.shaping import Shaping


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was read and checked; the weights stay on disk until a pipeline loads them.

    Attributes:
        folder: where its weights are.
        objective: what it was aligned to.
        base: `name_or_path` and the fingerprint of the base it belongs to.
        guidance: `shared`, `full`, `off` or `embedded`, as it was trained.
        guidance_scale: g of that guidance.
        num_inference_steps: denoising steps of its training.
        sha256: hash of the weights file, once it is written.
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
    sha256: str = ""
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


SAMPLING = ("guidance", "guidance_scale", "num_inference_steps")


def sampling_to_dict(of: Any) -> dict[str, Any]:
    """Guidance and steps of an adapter, a set or a gap profile."""
    return {key: getattr(of, key) for key in SAMPLING}


def sampling_from_dict(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `sampling_to_dict`; KeyError, TypeError or ValueError for a value that is missing or invalid."""
    steps, scale = values["num_inference_steps"], float(values["guidance_scale"])
    if not isinstance(steps, int | float) or steps < 1 or int(steps) != steps:
        raise ValueError(f"num_inference_steps {short_repr(steps)}; expected a whole number, 1 or more")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale {scale}; expected a finite number")
    return {"guidance": check_source(values["guidance"]), "guidance_scale": scale, "num_inference_steps": int(steps)}


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    shaping = objective.shaping
    return {
        "name": objective.name,
        "reward": objective.reward,
        "beta": objective.beta,
        "shaping": {"shift": shaping.shift, "scale": shaping.scale, "clip": list(shaping.clip)},
        "variance": schedule_to_dict(objective.variance),
    }


def adapter_to_dict(adapter: Adapter) -> dict[str, Any]:
    """The values of `objective.json`."""
    return {
        **objective_to_dict(adapter.objective),
        **sampling_to_dict(adapter),
        "base": adapter.base,
        "sha256": adapter.sha256,
        "record": adapter.record,
        "license": adapter.license,
        "source": adapter.source,
    }


def adapter_from_dict(folder: Path, values: Mapping[str, Any]) -> Adapter:
    """The inverse of `adapter_to_dict`; KeyError, TypeError or ValueError for values that make no adapter."""
    record = values.get("record", {})
    if not isinstance(record, dict) or not isinstance(record.get("validation") or {}, dict):
        raise ValueError(f"record {record!r}; expected an object")
    gain = record.get("gain")
    if gain is not None and not _is_interval(gain):
        raise ValueError(f"gain {short_repr(gain)}; expected an object with the numbers mean, low and high")
    if not re.fullmatch("[0-9a-f]{64}", str(values["sha256"])):
        raise ValueError(f"sha256 {short_repr(values['sha256'])}; expected 64 hexadecimal digits")
    return _adapter(folder, values, base=_check_base(values["base"]), sha256=values["sha256"], record=record)


def _is_interval(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"mean", "low", "high"}:
        return False
    return all(isinstance(number, int | float) for number in value.values() if number is not None)


def weights_to_dict(adapter: Adapter) -> dict[str, Any]:
    """The manifest's description of an adapter's weights."""
    return {"sha256": adapter.sha256, "bytes": adapter.size, "rank": adapter.rank}


def adapter_to_entry(adapter: Adapter) -> dict[str, Any]:
    """The entry of an adapter in the manifest of its set, of which its folder is a subfolder."""
    objective = objective_to_dict(adapter.objective)
    version = adapter.reward_version or reward_version(adapter)
    return {
        "name": objective["name"],
        "folder": adapter.folder.name,
        "weights": weights_to_dict(adapter),
        "reward": {"name": objective["reward"], "version": version, **objective["shaping"]},
        "beta": objective["beta"],
        "variance": objective["variance"],
        **sampling_to_dict(adapter),
        "gain": adapter.gain or recorded_gain(adapter.record),
        "training": adapter.record,
        "license": adapter.license,
        "source": adapter.source,
    }


def adapter_from_entry(folder: Path, entry: Mapping[str, Any], base: dict[str, Any]) -> Adapter:
    """The inverse of `adapter_to_entry`; ValueError for a subfolder outside the set, and for invalid values."""
    path = check_path_in_set(folder, entry["folder"])
    check_path_in_set(folder, entry["folder"], WEIGHTS)
    reward, weights = entry["reward"], entry["weights"]
    shaping = {key: reward[key] for key in ("shift", "scale", "clip") if key in reward}
    return _adapter(
        path,
        {**entry, "reward": reward["name"], "shaping": shaping},
        base=base,
        sha256=weights["sha256"],
        record=dict(entry.get("training", {})),
        gain=entry.get("gain"),
        reward_version=reward.get("version"),
        size=weights["bytes"],
        rank=weights["rank"],
    )


def _adapter(folder: Path, values: Mapping[str, Any], **others: Any) -> Adapter:
    """The parts that `objective.json` and a manifest's entry have in common, and others."""
    objective = Objective(
        name=values["name"],
        reward=values["reward"],
        variance=schedule_from_dict(values["variance"]),
        beta=float(values["beta"]),
        shaping=Shaping(**values.get("shaping", {})),
    )
    return Adapter(
        folder=folder,
        objective=objective,
        license=values.get("license"),
        source=values.get("source"),
        **sampling_from_dict(values),
        **others,
    )


def _check_base(base: Any) -> dict[str, Any]:
    keys = ("name_or_path", "architecture", "probe")
    probe = base.get("probe") if isinstance(base, dict) and all(key in base for key in keys) else None
    if not isinstance(probe, list) or not all(isinstance(value, int | float) for value in probe):
        raise ValueError(f"base {base!r}; expected {', '.join(keys)}")
    return base


def reward_version(adapter: Adapter) -> str | None:
    """The version of the reward: the hash of the file it came from, or the version of stepfuse that brings it."""
    files = adapter.record.get("inputs") or {}
    path = parse_reward(adapter.objective.reward).path
    if path in files:
        return f"sha256:{files[path]}"
    version = (adapter.record.get("versions") or {}).get("stepfuse")
    return f"stepfuse {version}" if version else None


def recorded_gain(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The gain that training measured on pairs of images; of a record of an earlier version, `validation_gain`."""
    return record["gain"] if "gain" in record else validation_gain(record.get("validation") or {})


def validation_gain(validation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mean reward after training minus the one before, ± 1.96 √(s_0² / n_0 + s_1² / n_1), its 95 % interval.

    The images are of the same prompts and noise: as independent samples they have a wider interval than they need.
    """
    moments = [validation.get(moment) or {} for moment in ("before", "after")]
    if any("reward" not in moment for moment in moments):
        return None
    before, after = moments
    mean = after["reward"] - before["reward"]
    if any("deviation" not in moment or moment["images"] < 2 for moment in moments):
        return {"mean": mean, "low": None, "high": None}
    half = 1.96 * math.sqrt(sum(moment["deviation"] ** 2 / moment["images"] for moment in moments))
    return {"mean": mean, "low": mean - half, "high": mean + half}
