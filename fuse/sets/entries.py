"""An adapter's entry in a set's manifest, and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepfuse.data.file_info import file_hash
from stepfuse.fuse.lora.file import open_lora
from stepfuse.fuse.lora.safe_files import WEIGHTS, write_json
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.schedules import schedule_from_dict, schedule_to_dict
from stepfuse.fuse.sets.adapter import Adapter
from stepfuse.fuse.sets.manifest import MANIFEST, inside, read_json
from stepfuse.rewards.shaping import Shaping


def adapter_to_entry(adapter: Adapter, folder: Path) -> dict[str, Any]:
    """What a manifest says of an adapter whose weights lie in a subfolder of the set, by default of its own name."""
    here = adapter.folder.parent.resolve() == folder.resolve()
    place = adapter.folder.name if here else adapter.name
    file = folder / place / WEIGHTS
    objective = adapter.objective
    shaping = objective.shaping
    return {
        "name": adapter.name,
        "folder": place,
        "weights": describe_weights(file),
        "reward": {
            "name": objective.reward,
            "version": adapter.reward_version or reward_version(adapter),
            "shift": shaping.shift,
            "scale": shaping.scale,
            "clip": list(shaping.clip),
        },
        "beta": objective.beta,
        "variance": schedule_to_dict(objective.variance),
        "guidance": adapter.guidance,
        "guidance_scale": adapter.guidance_scale,
        "num_inference_steps": adapter.num_inference_steps,
        "gain": adapter.gain or validation_gain(adapter.record.get("validation") or {}),
        "training": adapter.record,
        "license": adapter.license,
        "source": adapter.source,
    }


def record_weights(folder: Path) -> None:
    """Put hash, size and rank of a set's files into its manifest, where they differ; nothing else of it changes."""
    file = folder / MANIFEST
    values = read_json(file, "the manifest of an adapter set")
    entries = [*values["adapters"], *(oracle["adapter"] for oracle in values.get("oracles", []))]
    before = [entry["weights"] for entry in entries]
    for entry in entries:
        entry["weights"] = describe_weights(inside(folder, entry["folder"], WEIGHTS))
    if [entry["weights"] for entry in entries] != before:
        write_json(file, values)


def describe_weights(file: Path) -> dict[str, Any]:
    """What a manifest says of a file of weights."""
    return {"sha256": file_hash(file), "bytes": file.stat().st_size, "rank": open_lora(file).rank}


def adapter_from_entry(folder: Path, entry: Mapping[str, Any], base: dict[str, Any]) -> Adapter:
    """The inverse of `adapter_to_entry`; the weights are not looked at.

    Raises:
        ValueError: for a folder that is not of the set, and values that make no objective.
    """
    reward = entry["reward"]
    place = inside(folder, entry["folder"])
    inside(folder, entry["folder"], WEIGHTS)
    return Adapter(
        folder=place,
        objective=Objective(
            name=entry["name"],
            reward=reward["name"],
            variance=schedule_from_dict(entry["variance"]),
            beta=float(entry["beta"]),
            shaping=Shaping(
                shift=reward.get("shift", 0.0), scale=reward.get("scale", 1.0), clip=tuple(reward.get("clip", ()))
            ),
        ),
        base=base,
        guidance=entry["guidance"],
        guidance_scale=float(entry["guidance_scale"]),
        num_inference_steps=int(entry["num_inference_steps"]),
        sha256=entry["weights"]["sha256"],
        record=dict(entry.get("training", {})),
        gain=entry.get("gain"),
        reward_version=reward.get("version"),
        license=entry.get("license"),
        source=entry.get("source"),
        size=entry["weights"]["bytes"],
        rank=entry["weights"]["rank"],
    )


def reward_version(adapter: Adapter) -> str | None:
    """Which reward it was: the hash of the file it came from, or the version of stepfuse, whose own it is."""
    files = adapter.record.get("inputs") or {}
    for name in (adapter.objective.reward, adapter.objective.reward.rpartition(":")[0]):
        if name in files:
            return f"sha256:{files[name]}"
    own = (adapter.record.get("versions") or {}).get("stepfuse")
    return f"stepfuse {own}" if own else None


def validation_gain(validation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mean reward after training minus the one before, with its 95 % interval, of training's own images.

    mean ± 1.96 √(s_0² / n_0 + s_1² / n_1): as of independent samples. Both are of the same prompts and noise, so the
    interval is wider than it need be.
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
