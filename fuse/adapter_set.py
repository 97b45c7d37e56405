"""An adapter set: one base, N adapters, and what is needed to fuse them rightly, as a folder.

SET/
  adapter_set.json                        all that is known of it; docs/adapter-set.md
  NAME/pytorch_lora_weights.safetensors   one LoRA an objective, as `pipe.load_lora_weights` reads it
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepfuse.data import emoji
from stepfuse.fuse.adapter import (
    OBJECTIVE,
    Adapter,
    Objective,
    check_adapter,
    copy_weights,
    read_adapter,
)
from stepfuse.fuse.entries import adapter_from_entry, adapter_to_entry, check_entry
from stepfuse.fuse.gate import GapProfile, profile_from_dict, profile_to_dict
from stepfuse.fuse.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    check_files,
    check_schema,
    inside,
    read_json,
    write_json,
)
from stepfuse.fuse.pipeline import same_base
from stepfuse.fuse.variance import EtaSchedule, VarianceSchedule, schedule_from_dict, schedule_to_dict
from stepfuse.fuse.weights import weight_table
from stepfuse.rewards.weighted import Term, parse_terms

PACKAGES = ("stepfuse", "torch", "diffusers", "peft")
EMBEDDED_SETS = {"emoji": emoji.ADAPTER_SET}


@dataclass(frozen=True, kw_only=True)
class OracleAdapter:
    """An adapter trained on a weighted sum of the set's rewards.

    Attributes:
        adapter: read and checked like the others.
        weights: of that sum, by objective name.
        scales: σ_i in that sum, by objective name.
    """

    adapter: Adapter
    weights: dict[str, float]
    scales: dict[str, float]


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
        default_rule: how it is meant to be fused.
        oracles: adapters trained on mixtures of the rewards, to compare fusion with.
        profiles: how far a soup is from the product at each step, as `stepfuse set profile` measured it.
        evaluation: gains over the base that an evaluation measured.
        versions: of the packages it was made with.
    """

    base: dict[str, Any]
    adapters: tuple[Adapter, ...]
    reference: VarianceSchedule
    guidance: str
    guidance_scale: float
    num_inference_steps: int
    default_weights: dict[str, float]
    default_rule: str = "product"
    oracles: tuple[OracleAdapter, ...] = ()
    profiles: tuple[GapProfile, ...] = ()
    evaluation: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def reward_scales(self) -> dict[str, float]:
        """σ_i: the unit the oracles were trained with; without any, the deviation measured on the base's images."""
        measured = {a.name: a.record.get("validation", {}).get("before", {}).get("deviation") for a in self.adapters}
        known = {name: value for name, value in measured.items() if value}
        for oracle in self.oracles:
            known |= oracle.scales
        return known

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return tuple(adapter.objective for adapter in self.adapters)

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]

    @property
    def everyone(self) -> tuple[Adapter, ...]:
        """The adapters, and then the oracles."""
        return (*self.adapters, *(oracle.adapter for oracle in self.oracles))


def create_set(
    output: str | Path,
    folders: Sequence[str | Path],
    *,
    oracles: Sequence[str | Path] = (),
    reference: VarianceSchedule | None = None,
    half: bool = False,
    base_license: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> AdapterSet:
    """Copy trained adapters into a new set; the output is written whole or not at all.

    Guidance and steps are those the adapters were trained with. Oracles are adapters whose reward is a `weighted:`
    sum of the objectives' rewards. With `half` the weights are stored in float16, half the size.

    Args:
        folders, oracles: folders that training left, or those of adapters in other sets.
        base_license, license: of the base, and of adapters that do not state theirs, as the hub abbreviates them.

    Raises:
        ValueError: for no adapters, two of one name, adapters of different bases or guidance, an oracle
            of other rewards, or an output folder that is not empty.
    """
    output = Path(output)
    claim_output(output, overwrite=overwrite)
    adapters = [_licensed(find_adapter(folder), license) for folder in folders]
    if not adapters:
        raise ValueError("a set needs at least one adapter")
    first = adapters[0]
    extra = [_licensed(find_adapter(folder), license) for folder in oracles]
    weights = [{name: term.weight for name, term in _oracle_terms(oracle, adapters).items()} for oracle in extra]
    everyone = [*adapters, *extra]
    for adapter in everyone[1:]:
        if adapter.name in [a.name for a in everyone if a is not adapter]:
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
        for adapter in everyone:
            (aside / adapter.name).mkdir(parents=True)
            copy_weights(adapter, aside / adapter.name, half=half)
        created = AdapterSet(
            base=first.base | ({"license": base_license} if base_license else {}),
            adapters=tuple(adapters),
            reference=reference or EtaSchedule(eta=1.0),
            guidance=first.guidance,
            guidance_scale=first.guidance_scale,
            num_inference_steps=max(adapter.num_inference_steps for adapter in adapters),
            default_weights={adapter.name: 1 / len(adapters) for adapter in adapters},
            oracles=tuple(
                OracleAdapter(adapter=oracle, weights=own, scales={})
                for oracle, own in zip(extra, weights, strict=True)
            ),
            versions={name: version(name) for name in PACKAGES},
        )
        save_manifest(aside, created)
        load_set(aside)
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return load_set(output)


def find_adapter(folder: str | Path) -> Adapter:
    """An adapter in a folder of its own, as training leaves it, or in that of a set.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = Path(folder)
    if not (folder / OBJECTIVE).exists() and (folder.parent / MANIFEST).is_file():
        for adapter in load_set(folder.parent).everyone:
            if adapter.folder.name == folder.name:
                return adapter
    return read_adapter(folder)


def save_manifest(folder: Path, loaded: AdapterSet) -> None:
    """Write the manifest of a set whose weights lie in the folder; what `load_set` reads again."""
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "base": loaded.base,
            "reference": schedule_to_dict(loaded.reference),
            "guidance": loaded.guidance,
            "guidance_scale": loaded.guidance_scale,
            "num_inference_steps": loaded.num_inference_steps,
            "default_weights": loaded.default_weights,
            "default_rule": loaded.default_rule,
            "adapters": [adapter_to_entry(adapter, folder) for adapter in loaded.adapters],
            "oracles": [
                {"weights": oracle.weights, "adapter": adapter_to_entry(oracle.adapter, folder)}
                for oracle in loaded.oracles
            ],
            "profiles": [profile_to_dict(profile) for profile in loaded.profiles],
            "evaluation": loaded.evaluation,
            "versions": loaded.versions,
        },
    )


def load_set(folder: str | Path) -> AdapterSet:
    """Read and check a set: every file whole, every hash right, one base.

    Args:
        folder: where it lies, or `emoji`, the set of the embedded base.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = set_folder(folder)
    loaded, entries = read_manifest(folder)
    check_files(folder)
    for adapter, entry in zip(loaded.everyone, entries, strict=True):
        check_entry(adapter, entry)
        check_adapter(adapter)
    return loaded


def read_manifest(folder: Path) -> tuple[AdapterSet, list[dict[str, Any]]]:
    """What the manifest of a set says, and its adapters' entries; no weights are looked at.

    Raises:
        ValueError: naming the manifest and the value at fault.
    """
    file = inside(folder, MANIFEST)
    values = read_json(file, "an adapter set, as `stepfuse set create` leaves it")
    check_schema(file, values)
    mixed = values.get("oracles", [])
    entries = [*values["adapters"], *(entry["adapter"] for entry in mixed)]
    try:
        everyone = [adapter_from_entry(folder, entry, values["base"]) for entry in entries]
        adapters, oracles = everyone[: len(values["adapters"])], everyone[len(values["adapters"]) :]
        loaded = AdapterSet(
            base=values["base"],
            adapters=tuple(adapters),
            reference=schedule_from_dict(values["reference"]),
            guidance=values["guidance"],
            guidance_scale=float(values["guidance_scale"]),
            num_inference_steps=values["num_inference_steps"],
            default_weights=values["default_weights"],
            default_rule=values.get("default_rule", "product"),
            oracles=tuple(
                OracleAdapter(
                    adapter=oracle,
                    weights=given["weights"],
                    scales={name: term.scale for name, term in _oracle_terms(oracle, adapters).items()},
                )
                for oracle, given in zip(oracles, mixed, strict=True)
            ),
            profiles=tuple(profile_from_dict(profile) for profile in values.get("profiles", [])),
            evaluation=values.get("evaluation"),
            versions=values.get("versions", {}),
        )
        for key in ("name", "folder"):
            if len({entry[key] for entry in entries}) < len(entries):
                raise ValueError(f"two adapters have one {key}")
        measured = [mixture for profile in loaded.profiles for mixture in profile.mixtures]
        weight_table([loaded.default_weights, *(own.weights for own in loaded.oracles), *measured], loaded.names)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        told = str(error)
        raise ValueError(told if told.startswith(str(folder)) else f"{file} is malformed: {told}") from error
    return loaded, entries


def add_profile(folder: str | Path, profile: GapProfile) -> None:
    """Keep a gap profile with a set, in place of one of the same steps and guidance.

    Raises:
        ValueError: for what is no set, or cannot be written.
    """
    loaded, file = load_set(folder), check_writable(folder)
    same = ("num_inference_steps", "guidance", "guidance_scale")
    others = [p for p in loaded.profiles if any(getattr(p, key) != getattr(profile, key) for key in same)]
    save_manifest(file.parent, replace(loaded, profiles=(*others, profile)))


def add_evaluation(folder: str | Path, summary: Mapping[str, Any]) -> AdapterSet:
    """Keep with a set the gains that an evaluation of it measured, and of each adapter alone on its own reward.

    Raises:
        ValueError: for what is no set, or cannot be written.
    """
    loaded, file = load_set(folder), check_writable(folder)
    evaluation = shorten(summary)
    alone = {
        name: cell["gains"].get(name)
        for name in loaded.names
        for cell in evaluation["cells"]
        if cell["rule"] == "product" and cell["strength"] == 1 and cell["weights"] == f"{name}=1"
    }
    adapters = tuple(replace(a, gain=alone.get(a.name) or a.gain) for a in loaded.adapters)
    save_manifest(file.parent, replace(loaded, adapters=adapters, evaluation=evaluation))
    return load_set(file.parent)


def shorten(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation's summary what a manifest keeps: the gain of each cell in each objective's reward."""
    rewards = summary["objectives"]
    cells = []
    for cell in summary["cells"]:
        gains = {name: cell["rewards"].get(reward, {}).get("gain") for name, reward in rewards.items()}
        known = {name: {key: gain[key] for key in ("mean", "low", "high")} for name, gain in gains.items() if gain}
        if known:
            kept = {key: cell[key] for key in ("rule", "weights", "strength")}
            cells.append(kept | {"gains": known})
    return {"prompts": summary["prompts"], "seeds": summary["seeds"], "objectives": dict(rewards), "cells": cells}


def check_writable(folder: str | Path) -> Path:
    """The manifest of a set, to be written.

    Raises:
        ValueError: where it cannot be.
    """
    file = set_folder(folder) / MANIFEST
    if not (Path(folder) / MANIFEST).exists():
        raise ValueError(f"set {str(folder)!r} is the package's own; copy {file.parent} to a folder of your own")
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written; copy the set to a folder of your own")
    return file


def set_folder(folder: str | Path) -> Path:
    """Where a set lies: a folder, or one of `EMBEDDED_SETS` by its name."""
    named = EMBEDDED_SETS.get(str(folder), Path(folder))
    return Path(folder) if (Path(folder) / MANIFEST).exists() else named


def _licensed(adapter: Adapter, license: str | None) -> Adapter:
    return replace(adapter, license=adapter.license or license)


def _oracle_terms(oracle: Adapter, adapters: Sequence[Adapter]) -> dict[str, Term]:
    """The terms of the reward an oracle was trained on, by objective, matched by the objectives' rewards."""
    kind, _, sum_of = oracle.objective.reward.partition(":")
    if kind != "weighted":
        raise ValueError(
            f"oracle {oracle.name!r} was trained on {oracle.objective.reward!r}; expected a weighted:… reward"
        )
    names = {adapter.objective.reward: adapter.name for adapter in adapters}
    terms = {}
    for term in parse_terms(sum_of):
        if term.name not in names:
            raise ValueError(
                f"oracle {oracle.name!r} was trained on {term.name!r} too, and no adapter of the set was; "
                f"the set's rewards are {', '.join(names)}"
            )
        terms[names[term.name]] = term
    return terms


def claim_output(folder: Path, *, overwrite: bool, besides: Sequence[str] = ()) -> None:
    """See that an output folder is free to be written: empty, or with no more than `besides`.

    Raises:
        ValueError: for a folder that is not empty, unless `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; choose another")
    if folder.exists() and not overwrite and any(place.name not in besides for place in folder.iterdir()):
        raise ValueError(f"output {folder} exists and is not empty; choose another or pass --overwrite")
