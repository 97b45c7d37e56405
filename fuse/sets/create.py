"""Making sets: of trained adapters, with what was measured of them, and copies of others' sets."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepfuse.data.output_folder import check_output, files_named, replaced
from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.diffusion.variance import EtaSchedule, VarianceSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS, read_object
from stepfuse.fuse.rules.gap_profile import GapProfile
from stepfuse.fuse.sets.adapter import OBJECTIVE, Adapter, copy_weights, read_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, OracleAdapter, load_set, oracle_terms, save_manifest, set_folder
from stepfuse.fuse.sets.card import CARD, is_card
from stepfuse.fuse.sets.entries import record_weights
from stepfuse.fuse.sets.hub import PICTURES
from stepfuse.fuse.sets.manifest import MANIFEST, check_files

PACKAGES = ("stepfuse", "torch", "diffusers", "peft")


def create_set(
    output: str | Path,
    folders: Sequence[str | Path],
    *,
    oracles: Sequence[str | Path] = (),
    reference: VarianceSchedule | None = None,
    half: bool = False,
    base: str | None = None,
    base_license: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> AdapterSet:
    """Copy trained adapters into a new set; the output is written whole or not at all.

    With `overwrite` the files of a set in the output folder are replaced, and other files stay. The adapters may be
    those of that set.

    Guidance and steps are those the adapters were trained with. Oracles are adapters whose reward is a `weighted:`
    sum of the objectives' rewards. With `half` the weights are stored in float16, half the size.

    Args:
        folders, oracles: folders that training left, or those of adapters in other sets.
        base: how others call the base, where the adapters were trained from a folder.
        base_license, license: of the base, and of adapters that do not state theirs, as the hub abbreviates them.

    Raises:
        ValueError: for no adapters, two of one name, adapters of different bases or guidance, an oracle
            of other rewards, or an output folder that is not empty or cannot be written.
    """
    output = Path(output)
    check_set_output(output, overwrite=overwrite)
    adapters = [_licensed(find_adapter(folder), license) for folder in folders]
    if not adapters:
        raise ValueError("a set needs at least one adapter")
    first = adapters[0]
    extra = [_licensed(find_adapter(folder), license) for folder in oracles]
    weights = [{name: term.weight for name, term in oracle_terms(oracle, adapters).items()} for oracle in extra]
    everyone = [*adapters, *extra]
    for adapter in everyone[1:]:
        if adapter.name in [a.name for a in everyone if a is not adapter]:
            raise ValueError(f"two adapters are named {adapter.name!r}; train one under another --objective_name")
        check_same(adapter, first)
    known = _richest(everyone) | _stated(license=base_license)
    if base:
        known |= {"name_or_path": base, "revision": None}
    with replaced(output, ours=set_files, check=load_set) as temporary:
        for adapter in everyone:
            (temporary / adapter.name).mkdir()
            copy_weights(adapter, temporary / adapter.name, half=half)
        created = AdapterSet(
            base=known,
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
        save_manifest(temporary, created)
    return load_set(output)


def check_set_output(output: Path, *, overwrite: bool) -> None:
    """Check that a set may be written to a folder: files of other origin stay, and the set must be valid with them.

    Raises:
        ValueError: for a folder that is not empty, unless `overwrite`, and for a pickle or a link to elsewhere in it.
    """
    folder = check_output(output, overwrite=overwrite, ours=set_files, writes=[MANIFEST])
    check_files(folder, besides=set_files(folder))


def set_files(folder: Path) -> set[Path]:
    """The files of the set in a folder, which --overwrite replaces; none where there is no set.

    These are the manifest, the weights that it lists (where it cannot be read, those of every subfolder), the card if
    stepfuse wrote it, and its pictures.
    """
    if not (folder / MANIFEST).is_file():
        return set()
    try:
        values = read_object(folder / MANIFEST, "an adapter set")
        entries = [*values["adapters"], *(oracle["adapter"] for oracle in values.get("oracles", []))]
        names = [str(entry["folder"]) for entry in entries]
    except (ValueError, KeyError, TypeError):
        names = [place.name for place in folder.iterdir() if (place / WEIGHTS).is_file()]
    shown = [name for name in PICTURES if name != CARD or is_card(folder / CARD)]
    return files_named(folder, MANIFEST, *shown, *(Path(name, WEIGHTS) for name in names))


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


def set_licences(folder: str | Path, *, license: str | None, base_license: str | None) -> AdapterSet:
    """State the licence of the adapters that have none stated, and of the base.

    Raises:
        ValueError: for what is no set, or cannot be written.
    """
    loaded, file = load_set(folder), check_writable(folder)
    changed = replace(
        loaded,
        base=loaded.base | _stated(license=base_license),
        adapters=tuple(_licensed(adapter, license) for adapter in loaded.adapters),
        oracles=tuple(replace(own, adapter=_licensed(own.adapter, license)) for own in loaded.oracles),
    )
    save_manifest(file.parent, changed)
    return load_set(file.parent)


def add_adapter(folder: str | Path, source: str | Path) -> AdapterSet:
    """Put one adapter more into a set; the manifest is written last. Default weights become equal.

    Raises:
        ValueError: for a name that is taken, another base or guidance, and a set that cannot be written.
    """
    loaded, file = load_set(folder), check_writable(folder)
    adapter, first = find_adapter(source), loaded.adapters[0]
    if adapter.name in [own.name for own in loaded.everyone] or (file.parent / adapter.name).exists():
        raise ValueError(f"set {file.parent} has {adapter.name!r} already; choose another name")
    check_same(adapter, replace(first, guidance=loaded.guidance, guidance_scale=loaded.guidance_scale))
    pictures = {Path(name) for name in PICTURES}  # they stay
    with replaced(file.parent, ours=lambda there: set_files(there) - pictures, check=load_set) as temporary:

        def copied(own: Adapter, name: str) -> Adapter:
            (temporary / name).mkdir()
            copy_weights(own, temporary / name)
            return replace(own, folder=temporary / name)

        everyone = (*(copied(own, own.folder.name) for own in loaded.adapters), copied(adapter, adapter.name))
        oracles = tuple(replace(o, adapter=copied(o.adapter, o.adapter.folder.name)) for o in loaded.oracles)
        weights = {own.name: 1 / len(everyone) for own in everyone}
        save_manifest(temporary, replace(loaded, adapters=everyone, oracles=oracles, default_weights=weights))
    return load_set(file.parent)


def copy_set(name: str | Path, output: Path, *, overwrite: bool = False) -> AdapterSet:
    """Copy a set, fetched from the hub where it is there, to a folder of one's own; written whole or not at all.

    Weights in a former layout are written in today's, and the manifest says their hashes.

    Raises:
        ValueError: for a faulty set, and an output folder that is not empty.
    """
    check_set_output(output, overwrite=overwrite)
    source = set_folder(name)
    loaded = load_set(source)
    with replaced(output, ours=set_files, check=load_set) as temporary:
        shutil.copyfile(source / MANIFEST, temporary / MANIFEST)
        for adapter in loaded.everyone:
            (temporary / adapter.folder.name).mkdir()
            copy_weights(adapter, temporary / adapter.folder.name)
        record_weights(temporary)
        for picture in PICTURES:
            if (source / picture).is_file():
                shutil.copyfile(source / picture, temporary / picture)
    return load_set(output)


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
        raise ValueError(
            f"set {str(folder)!r} is not in a folder of yours; `stepfuse pull {folder} FOLDER` copies it to one"
        )
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        raise ValueError(f"{file} cannot be written; copy the set to a folder of your own")
    return file


def check_same(adapter: Adapter, first: Adapter) -> None:
    """See that an adapter is of the base and the guidance of another.

    Raises:
        ValueError: naming both.
    """
    if not same_base(adapter.base, first.base):
        raise ValueError(
            f"adapter {adapter.name!r} belongs to base {adapter.base.get('name_or_path')!r} and "
            f"{first.name!r} to {first.base.get('name_or_path')!r}; a set has one base"
        )
    paths = [own.base.get("noise_path") for own in (adapter, first)]
    if all(paths) and paths[0] != paths[1]:
        raise ValueError(
            f"adapter {adapter.name!r} was trained on the noise path {paths[0]} and {first.name!r} on {paths[1]}; "
            "a set has one"
        )
    if (adapter.guidance, adapter.guidance_scale) != (first.guidance, first.guidance_scale):
        raise ValueError(
            f"adapter {adapter.name!r} was trained with guidance {adapter.guidance} {adapter.guidance_scale:g} "
            f"and {first.name!r} with {first.guidance} {first.guidance_scale:g}; a set has one guidance"
        )


def _richest(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What all of them know of their base."""
    base: dict[str, Any] = {}
    for adapter in reversed(adapters):
        base |= {key: value for key, value in adapter.base.items() if value is not None}
    return base


def _stated(**values: str | None) -> dict[str, str]:
    """What is not None."""
    return {key: value for key, value in values.items() if value is not None}


def _licensed(adapter: Adapter, license: str | None) -> Adapter:
    return replace(adapter, license=adapter.license or license)
