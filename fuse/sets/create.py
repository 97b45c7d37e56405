"""Making sets: of trained adapters, and copies of other sets."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepfuse.data.folder_files import files_named
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.output_folder import atomic_output_dir, require_empty_dir
from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.diffusion.variance import EtaSchedule, VarianceSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.adapter import OBJECTIVE, copy_weights, read_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, OracleAdapter, load_set, oracle_terms, save_manifest, set_folder
from stepfuse.fuse.sets.card import CARD, is_card
from stepfuse.fuse.sets.edit import add_license, check_writable
from stepfuse.fuse.sets.entries import Adapter, describe_weights
from stepfuse.fuse.sets.hub import PICTURES
from stepfuse.fuse.sets.manifest import MANIFEST, adapter_entries, check_files, check_path_in_set, read_versioned

PACKAGES = ("stepfuse", "torch", "diffusers", "peft")


def create_set(
    output: str | Path,
    folders: Sequence[str | Path],
    *,
    oracles: Sequence[str | Path] = (),
    base_schedule: VarianceSchedule | None = None,
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
        folders, oracles: folders that training wrote, or those of adapters in other sets.
        base_schedule: variance schedule of the base policy; by default eta 1.
        base: how others call the base, where the adapters were trained from a folder.
        base_license, license: of the base, and of adapters that do not state theirs, as the hub abbreviates them.

    Raises:
        ValueError: for no adapters, two of one name, adapters of different bases or guidance, an oracle
            of other rewards, or an output folder that is not empty or cannot be written.
    """
    output = Path(output)
    check_set_output(output, overwrite=overwrite)
    adapters = [add_license(find_adapter(folder), license) for folder in folders]
    if not adapters:
        raise ValueError("a set needs at least one adapter")
    first = adapters[0]
    extra = [add_license(find_adapter(folder), license) for folder in oracles]
    weights = [{name: term.weight for name, term in oracle_terms(oracle, adapters).items()} for oracle in extra]
    all_adapters = [*adapters, *extra]
    for adapter in all_adapters[1:]:
        if adapter.name in [a.name for a in all_adapters if a is not adapter]:
            raise ValueError(f"two adapters are named {adapter.name!r}; train one under another --objective_name")
        check_same(adapter, first)
    known = _merge_bases(all_adapters)
    if base_license is not None:
        known["license"] = base_license
    if base:
        known |= {"name_or_path": base, "revision": None}
    with atomic_output_dir(output, ours=set_files, check=load_set) as temporary:
        for adapter in all_adapters:
            _copy(adapter, temporary / adapter.name, half=half)
        created = AdapterSet(
            base=known,
            adapters=tuple(adapters),
            base_schedule=base_schedule or EtaSchedule(eta=1.0),
            guidance=first.guidance,
            guidance_scale=first.guidance_scale,
            num_inference_steps=max(adapter.num_inference_steps for adapter in adapters),
            default_weights={adapter.name: 1 / len(adapters) for adapter in adapters},
            oracles=tuple(
                OracleAdapter(adapter=oracle, weights=mixture, scales={})
                for oracle, mixture in zip(extra, weights, strict=True)
            ),
            versions={name: version(name) for name in PACKAGES},
        )
        save_manifest(temporary, created)
    return load_set(output, read_weights=False)


def check_set_output(output: Path, *, overwrite: bool) -> None:
    """Check that a set may be written to a folder: files of other origin stay, and the set must be valid with them.

    Raises:
        ValueError: for a folder that is not empty, unless `overwrite`, and for a pickle or a link to elsewhere in it.
    """
    folder = require_empty_dir(output, overwrite=overwrite, ours=set_files, writes=[MANIFEST])
    check_files(folder, besides=set_files(folder))


def set_files(folder: Path) -> set[Path]:
    """The files of the set in a folder, which --overwrite replaces; none where there is no set.

    These are the manifest, the weights that it lists (where it cannot be read, those of every subfolder), the card if
    stepfuse wrote it, and its pictures.
    """
    if not (folder / MANIFEST).is_file():
        return set()
    try:
        values = read_json(folder / MANIFEST, "an adapter set")
        names = [str(entry["folder"]) for entry in adapter_entries(values)]
    except (ValueError, KeyError, TypeError):
        names = [inner.name for inner in folder.iterdir() if (inner / WEIGHTS).is_file()]
    shown = [name for name in PICTURES if name != CARD or is_card(folder / CARD)]
    return files_named(folder, MANIFEST, *shown, *(Path(name, WEIGHTS) for name in names))


def find_adapter(folder: str | Path) -> Adapter:
    """An adapter in a folder, as training writes it, or in the subfolder of a set.

    Raises:
        ValueError: naming the file at fault.
    """
    folder = Path(folder)
    if not (folder / OBJECTIVE).exists() and (folder.parent / MANIFEST).is_file():
        for adapter in load_set(folder.parent).all_adapters:
            if adapter.folder.name == folder.name:
                return adapter
    return read_adapter(folder)


def add_adapter(folder: str | Path, source: str | Path) -> AdapterSet:
    """Put one adapter more into a set; the manifest is written last. Default weights become equal.

    Raises:
        ValueError: for a name that is taken, another base or guidance, and a set that cannot be written.
    """
    loaded, file = load_set(folder), check_writable(folder)
    adapter, first = find_adapter(source), loaded.adapters[0]
    if adapter.name in [known.name for known in loaded.all_adapters] or (file.parent / adapter.name).exists():
        raise ValueError(f"set {file.parent} has {adapter.name!r} already; choose another name")
    check_same(adapter, replace(first, guidance=loaded.guidance, guidance_scale=loaded.guidance_scale))
    pictures = {Path(name) for name in PICTURES}  # they stay
    with atomic_output_dir(file.parent, ours=lambda folder: set_files(folder) - pictures, check=load_set) as temporary:
        changed = loaded.map_adapters(lambda known: _copy(known, temporary / known.folder.name))
        adapters = (*changed.adapters, _copy(adapter, temporary / adapter.name))
        weights = {known.name: 1 / len(adapters) for known in adapters}
        save_manifest(temporary, replace(changed, adapters=adapters, default_weights=weights))
    return load_set(file.parent, read_weights=False)


def copy_set(name: str | Path, output: Path, *, overwrite: bool = False) -> AdapterSet:
    """Copy a set, fetched from the hub where it is there, to another folder; written whole or not at all.

    Weights in an earlier layout are written in the current one, and their hashes in the manifest follow.

    Raises:
        ValueError: for a faulty set, and an output folder that is not empty.
    """
    check_set_output(output, overwrite=overwrite)
    source = set_folder(name)
    loaded = load_set(source)
    with atomic_output_dir(output, ours=set_files, check=load_set) as temporary:
        shutil.copyfile(source / MANIFEST, temporary / MANIFEST)
        for adapter in loaded.all_adapters:
            _copy(adapter, temporary / adapter.folder.name)
        _record_weights(temporary)
        for picture in PICTURES:
            if (source / picture).is_file():
                shutil.copyfile(source / picture, temporary / picture)
    return load_set(output, read_weights=False)


def check_same(adapter: Adapter, first: Adapter) -> None:
    """Check that an adapter is of the base and the guidance of another.

    Raises:
        ValueError: naming both.
    """
    if not same_base(adapter.base, first.base):
        raise ValueError(
            f"adapter {adapter.name!r} belongs to base {adapter.base.get('name_or_path')!r} and "
            f"{first.name!r} to {first.base.get('name_or_path')!r}; a set has one base"
        )
    paths = [known.base.get("noise_path") for known in (adapter, first)]
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


def _merge_bases(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """All that adapters record of their common base; of what several record, that of the first."""
    base: dict[str, Any] = {}
    for adapter in reversed(adapters):
        base |= {key: value for key, value in adapter.base.items() if value is not None}
    return base


def _copy(adapter: Adapter, folder: Path, *, half: bool = False) -> Adapter:
    """An adapter with its weights copied to a new folder."""
    folder.mkdir()
    copy_weights(adapter, folder, half=half)
    return replace(adapter, folder=folder, size=None, rank=None)


def _record_weights(folder: Path) -> None:
    """Put hash, size and rank of a set's files into its manifest, where they differ; nothing else of it changes."""
    values = read_versioned(folder / MANIFEST, "the manifest of an adapter set")
    entries = adapter_entries(values)
    before = [entry["weights"] for entry in entries]
    for entry in entries:
        entry["weights"] = describe_weights(check_path_in_set(folder, entry["folder"], WEIGHTS))
    if [entry["weights"] for entry in entries] != before:
        write_json(folder / MANIFEST, values)
