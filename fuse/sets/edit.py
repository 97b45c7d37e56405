"""Changes of what the manifest of a set says: licences, and what was measured. The weights stay, and are not read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepfuse.fuse.rules.gap_profile import GapProfile
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set, save_manifest
from stepfuse.fuse.sets.entries import Adapter, sampling_to_dict
from stepfuse.fuse.sets.manifest import check_writable


def set_licences(folder: str | Path, *, license: str | None, base_license: str | None) -> AdapterSet:
    """State the licence of the adapters that state none, and of the base; ValueError for a set that is not writable."""
    loaded, folder = load_set(folder, read_weights=False), check_writable(folder)
    base = loaded.base if base_license is None else loaded.base | {"license": base_license}
    changed = replace(loaded, base=base).map_adapters(lambda adapter: add_license(adapter, license))
    save_manifest(folder, changed)
    return load_set(folder, read_weights=False)


def add_license(adapter: Adapter, license: str | None) -> Adapter:
    """The adapter with a licence, if it states none."""
    return replace(adapter, license=adapter.license or license)


def add_profile(folder: str | Path, profile: GapProfile) -> AdapterSet:
    """Keep a gap profile with a set, in place of one of the same steps and guidance."""
    loaded, folder = load_set(folder, read_weights=False), check_writable(folder)
    settings = sampling_to_dict(profile)
    others = [other for other in loaded.profiles if sampling_to_dict(other) != settings]
    save_manifest(folder, replace(loaded, profiles=(*others, profile)))
    return load_set(folder, read_weights=False)


def add_evaluation(folder: str | Path, summary: Mapping[str, Any]) -> AdapterSet:
    """Keep with a set the gains that an evaluation of it measured, see `add_gains`."""
    return add_gains(folder, shorten(summary))


def add_gains(folder: str | Path, evaluation: Mapping[str, Any]) -> AdapterSet:
    """Keep with a set the gains that were measured of it, and with each adapter that of all weight on it alone.

    Args:
        evaluation: As in the manifest. All weight on one adapter is the same image by the product and by a soup.
    """
    loaded, folder = load_set(folder, read_weights=False), check_writable(folder)
    alone = {
        name: cell["gains"][name]
        for name in loaded.names
        for rule in ("soup", "soup_factors", "product")
        for cell in evaluation["cells"]
        if cell["rule"] == rule and cell["strength"] == 1 and cell["weights"] == f"{name}=1" and cell["gains"].get(name)
    }
    adapters = tuple(replace(a, gain=alone.get(a.name) or a.gain) for a in loaded.adapters)
    save_manifest(folder, replace(loaded, adapters=adapters, evaluation=dict(evaluation)))
    return load_set(folder, read_weights=False)


def shorten(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an evaluation's summary that a manifest keeps: the gain of each cell in each objective's reward.

    Rules of other sets, which the evaluation compared with this one, are left out.
    """
    rewards, others = summary["objectives"], summary.get("sets", {})
    cells = []
    for cell in summary["cells"]:
        if cell["rule"] in others:
            continue
        gains = {name: cell["rewards"].get(reward, {}).get("gain") for name, reward in rewards.items()}
        known = {name: {key: gain[key] for key in ("mean", "low", "high")} for name, gain in gains.items() if gain}
        if known:
            kept = {key: cell[key] for key in ("rule", "weights", "strength")}
            cells.append(kept | {"gains": known})
    return {"prompts": summary["prompts"], "seeds": summary["seeds"], "objectives": dict(rewards), "cells": cells}
