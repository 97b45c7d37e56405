"""An adapter set: one base, N adapters, and what is needed to fuse them rightly, as a folder.

SET/
  adapter_set.json     base, reference schedule, guidance, steps, default weights, the adapters' hashes
  NAME/                one adapter folder an objective
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepfuse.data import emoji
from stepfuse.fuse.adapter import (
    FORMAT_VERSION,
    WEIGHTS,
    Adapter,
    Objective,
    check_base,
    check_guidance,
    check_steps,
    copy_adapter,
    file_hash,
    read_adapter,
    read_json,
    write_json,
)
from stepfuse.fuse.gate import GapProfile, profile_from_dict, profile_to_dict
from stepfuse.fuse.pipeline import same_base
from stepfuse.fuse.variance import EtaSchedule, VarianceSchedule, schedule_from_dict, schedule_to_dict
from stepfuse.fuse.weights import weight_table
from stepfuse.rewards.weighted import Term, parse_terms

MANIFEST = "adapter_set.json"
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
        oracles: adapters trained on mixtures of the rewards, to compare fusion with.
        profiles: how far a soup is from the product at each step, as `stepfuse set profile` measured it.
    """

    base: dict[str, Any]
    adapters: tuple[Adapter, ...]
    reference: VarianceSchedule
    guidance: str
    guidance_scale: float
    num_inference_steps: int
    default_weights: dict[str, float]
    oracles: tuple[OracleAdapter, ...] = ()
    profiles: tuple[GapProfile, ...] = ()

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


def create_set(
    output: str | Path,
    folders: Sequence[str | Path],
    *,
    oracles: Sequence[str | Path] = (),
    reference: VarianceSchedule | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> AdapterSet:
    """Copy trained adapters into a new set; the output is written whole or not at all.

    Guidance and steps are those the adapters were trained with. Oracles are adapters whose reward is a `weighted:`
    sum of the objectives' rewards. With `half` the weights are stored in float16, half the size.

    Raises:
        ValueError: for no adapters, two of one name, adapters of different bases or guidance, an oracle
            of other rewards, or an output folder that is not empty.
    """
    output = Path(output)
    claim_output(output, overwrite=overwrite)
    adapters = [read_adapter(folder) for folder in folders]
    if not adapters:
        raise ValueError("a set needs at least one adapter")
    first = adapters[0]
    extra = [read_adapter(folder) for folder in oracles]
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
            copy_adapter(adapter, aside / adapter.name, half=half)
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
                "adapters": [_entry(aside, a) for a in adapters],
                "oracles": [_entry(aside, a) | {"weights": w} for a, w in zip(extra, weights, strict=True)],
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

    Args:
        folder: where it lies, or `emoji`, the set of the embedded base.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = set_folder(folder)
    file = folder / MANIFEST
    values = read_json(file, "an adapter set, as `stepfuse set create` leaves it")
    try:
        mixed = values.get("oracles", [])
        entries = [(entry["name"], entry["folder"], entry["sha256"]) for entry in [*values["adapters"], *mixed]]
        weights = [dict(entry["weights"]) for entry in mixed]
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; create the set again") from error
    except TypeError as error:
        raise ValueError(f"{file} is malformed: {error}") from error
    everyone = tuple(read_adapter(_inside(folder, place)) for _, place, _ in entries)
    adapters, oracles = everyone[: len(everyone) - len(weights)], everyone[len(everyone) - len(weights) :]
    try:
        loaded = AdapterSet(
            base=check_base(values["base"]),
            adapters=adapters,
            reference=schedule_from_dict(values["reference"]),
            guidance=check_guidance(values["guidance"]),
            guidance_scale=float(values["guidance_scale"]),
            num_inference_steps=check_steps(values["num_inference_steps"]),
            default_weights=dict(values["default_weights"]),
            oracles=tuple(
                OracleAdapter(
                    adapter=oracle,
                    weights=given,
                    scales={name: term.scale for name, term in _oracle_terms(oracle, adapters).items()},
                )
                for oracle, given in zip(oracles, weights, strict=True)
            ),
            profiles=tuple(profile_from_dict(profile) for profile in values.get("profiles", [])),
        )
        measured = [mixture for profile in loaded.profiles for mixture in profile.mixtures]
        weight_table([loaded.default_weights, *weights, *measured], loaded.names)
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; create the set again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is malformed: {error}") from error
    for adapter, (name, place, sha256) in zip(everyone, entries, strict=True):
        if adapter.name != name or adapter.sha256 != sha256:
            raise ValueError(f"{file}: adapter {name!r} in {place} is not the one the set was made of; create it again")
        if not same_base(adapter.base, loaded.base):
            raise ValueError(f"{file}: adapter {name!r} belongs to another base, {adapter.base.get('name_or_path')!r}")
    return loaded


def add_profile(folder: str | Path, profile: GapProfile) -> None:
    """Keep a gap profile with a set, in place of one of the same steps and guidance.

    Raises:
        ValueError: for what is no set, or cannot be written.
    """
    loaded, file = load_set(folder), check_writable(folder)
    same = ("num_inference_steps", "guidance", "guidance_scale")
    others = [p for p in loaded.profiles if any(getattr(p, key) != getattr(profile, key) for key in same)]
    values = read_json(file, "an adapter set")
    write_json(file, values | {"profiles": [profile_to_dict(p) for p in (*others, profile)]})


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


def _entry(folder: Path, adapter: Adapter) -> dict[str, Any]:
    sha256 = file_hash(folder / adapter.name / WEIGHTS)
    return {"name": adapter.name, "folder": adapter.name, "sha256": sha256}


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


def _inside(folder: Path, place: str) -> Path:
    """A subfolder by its name alone: a manifest may not point outside its set."""
    if not isinstance(place, str) or Path(place).name != place or place in ("", ".", ".."):
        raise ValueError(f"{folder / MANIFEST}: adapter folder {place!r}; expected the name of a subfolder")
    return folder / place
