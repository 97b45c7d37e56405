"""An adapter set: one base, N adapters, and what is needed to fuse them rightly, as a folder.

SET/
  adapter_set.json     base, reference schedule, guidance, steps, default weights, the adapters' hashes
  NAME/                one adapter folder an objective
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepfuse.fuse.adapter import (
    FORMAT_VERSION,
    OBJECTIVE,
    WEIGHTS,
    Adapter,
    Objective,
    check_base,
    check_guidance,
    check_steps,
    read_adapter,
    read_json,
    write_json,
)
from stepfuse.fuse.pipeline import same_base
from stepfuse.fuse.rules import blend_weights
from stepfuse.fuse.variance import EtaSchedule, VarianceSchedule, schedule_from_dict, schedule_to_dict

MANIFEST = "adapter_set.json"


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """Adapters of one base that may be fused.

    Attributes:
        base: `name_or_path` and fingerprint.
        adapters: in the order of the manifest.
        reference: variance schedule of the base policy, which counts where the strength is not 1.
        guidance: `shared`, `full` or `off`.
        guidance_scale: g.
        num_inference_steps: default number of denoising steps.
        default_weights: by objective name.
    """

    base: dict[str, Any]
    adapters: tuple[Adapter, ...]
    reference: VarianceSchedule
    guidance: str
    guidance_scale: float
    num_inference_steps: int
    default_weights: dict[str, float]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return tuple(adapter.objective for adapter in self.adapters)

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]


def create_set(
    output: str | Path,
    folders: Sequence[str | Path],
    *,
    reference: VarianceSchedule | None = None,
    overwrite: bool = False,
) -> AdapterSet:
    """Copy trained adapters into a new set; the output is written whole or not at all.

    Guidance and steps are those the adapters were trained with.

    Raises:
        ValueError: for no adapters, two of one name, adapters of different bases or guidance, or an
            output folder that is not empty.
    """
    output = Path(output)
    claim_output(output, overwrite=overwrite)
    adapters = [read_adapter(folder) for folder in folders]
    if not adapters:
        raise ValueError("a set needs at least one adapter")
    first = adapters[0]
    for adapter in adapters[1:]:
        if adapter.name in [a.name for a in adapters if a is not adapter]:
            raise ValueError(f"two adapters are named {adapter.name!r}; train one under another --objective_name")
        if not same_base(adapter.base, first.base):
            raise ValueError(
                f"adapter {adapter.name!r} belongs to base {adapter.base.get('name_or_path')!r} and "
                f"{first.name!r} to {first.base.get('name_or_path')!r}; a set has one base"
            )
        if (adapter.guidance, adapter.guidance_scale) != (first.guidance, first.guidance_scale):
            raise ValueError(
                f"adapter {adapter.name!r} was trained with guidance {adapter.guidance} {adapter.guidance_scale:g} "
                f"and {first.name!r} with {first.guidance} {first.guidance_scale:g}; a set has one guidance"
            )
    aside = output.with_name(output.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for adapter in adapters:
            (aside / adapter.name).mkdir(parents=True)
            for name in (WEIGHTS, OBJECTIVE):
                shutil.copyfile(adapter.folder / name, aside / adapter.name / name)
        write_json(
            aside / MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "base": first.base,
                "reference": schedule_to_dict(reference or EtaSchedule(eta=1.0)),
                "guidance": first.guidance,
                "guidance_scale": first.guidance_scale,
                "num_inference_steps": max(adapter.num_inference_steps for adapter in adapters),
                "default_weights": {adapter.name: 1 / len(adapters) for adapter in adapters},
                "adapters": [{"name": a.name, "folder": a.name, "sha256": a.sha256} for a in adapters],
            },
        )
        load_set(aside)
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return load_set(output)


def load_set(folder: str | Path) -> AdapterSet:
    """Read and check a set: every file whole, every hash right, one base.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = Path(folder)
    file = folder / MANIFEST
    values = read_json(file, "an adapter set, as `stepfuse set create` leaves it")
    try:
        entries = [(entry["name"], entry["folder"], entry["sha256"]) for entry in values["adapters"]]
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; create the set again") from error
    except TypeError as error:
        raise ValueError(f"{file} is malformed: {error}") from error
    adapters = tuple(read_adapter(_inside(folder, place)) for _, place, _ in entries)
    try:
        loaded = AdapterSet(
            base=check_base(values["base"]),
            adapters=adapters,
            reference=schedule_from_dict(values["reference"]),
            guidance=check_guidance(values["guidance"]),
            guidance_scale=float(values["guidance_scale"]),
            num_inference_steps=check_steps(values["num_inference_steps"]),
            default_weights=dict(values["default_weights"]),
        )
        blend_weights([loaded.default_weights], loaded.names)
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; create the set again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is malformed: {error}") from error
    for adapter, (name, place, sha256) in zip(loaded.adapters, entries, strict=True):
        if adapter.name != name or adapter.sha256 != sha256:
            raise ValueError(f"{file}: adapter {name!r} in {place} is not the one the set was made of; create it again")
        if not same_base(adapter.base, loaded.base):
            raise ValueError(f"{file}: adapter {name!r} belongs to another base, {adapter.base.get('name_or_path')!r}")
    return loaded


def claim_output(folder: Path, *, overwrite: bool) -> None:
    """See that an output folder is free to be written.

    Raises:
        ValueError: for a folder that is not empty, unless `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; choose another")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"output {folder} exists and is not empty; choose another or pass --overwrite")


def _inside(folder: Path, place: str) -> Path:
    """A subfolder by its name alone: a manifest may not point outside its set."""
    if not isinstance(place, str) or Path(place).name != place or place in ("", ".", ".."):
        raise ValueError(f"{folder / MANIFEST}: adapter folder {place!r}; expected the name of a subfolder")
    return folder / place
