"""Making sets: of trained adapters, and copies of other sets."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepfuse.data.folder_files import files_named
from stepfuse.data.json_file import read_json, write_json
from stepfuse.data.names import nearest
from stepfuse.data.output_folder import atomic_output_dir, require_empty_dir
from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.backbones.guidance import Guidance
from stepfuse.fuse.backbones.loading import check_embeds_guidance
from stepfuse.fuse.diffusion.variance import EtaSchedule, VarianceSchedule
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.registry import RULES
from stepfuse.fuse.sets.adapter import check_adapter, copy_adapter, read_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set, make_oracle, read_manifest, save_manifest, set_folder
from stepfuse.fuse.sets.card import is_card
from stepfuse.fuse.sets.edit import add_license
from stepfuse.fuse.sets.entries import Adapter, weights_to_dict
from stepfuse.fuse.sets.manifest import CARD, MANIFEST, OBJECTIVE, SHOWN, adapter_entries, check_files, check_writable
from stepfuse.fuse.sets.set_training import training_of

PACKAGES = ("stepfuse", "torch", "diffusers", "peft")


def create_set(
    output: str | Path,
    folders: Sequence[str | Path],
    *,
    oracles: Sequence[str | Path] = (),
    rule: str | None = None,
    base_schedule: VarianceSchedule | None = None,
    guidance: str | None = None,
    guidance_scale: float | None = None,
    half: bool = False,
    base: str | None = None,
    base_license: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> AdapterSet:
    """Copy trained adapters into a new set; the output is written whole or not at all.

    With `overwrite` the files of a set in the output folder are replaced, and other files stay. The adapters may be
    those of that set.

    Steps are those the adapters were trained with, and so is the resolution if it is one. Oracles are adapters whose
    reward is a `weighted:` sum of the objectives' rewards. With `half` the weights are stored in float16.

    Args:
        folders, oracles: folders that training wrote, or those of adapters in other sets. That of a run with several
            objectives stands for the adapters of all.
        rule: default fusion rule, one of `RULES`; by default `product`, or for adapters that were trained together the
            rule that they were trained for.
        base_schedule: variance schedule of the base policy; by default eta 1.
        guidance, guidance_scale: of the images that are sampled with the set; by default as the adapters were trained.
        base: how others call the base, where the adapters were trained from a folder.
        base_license, license: of the base, and of adapters that do not state theirs, as the hub abbreviates them.

    Raises:
        ValueError: for no adapters, two of one name, adapters of different bases or guidance, guidance without a scale
            where they were trained without, an oracle of other rewards, or an output folder that is not empty or cannot
            be written.
    """
    output = Path(output)
    check_set_output(output, overwrite=overwrite)
    if rule is not None and rule not in RULES:
        raise ValueError(f"default rule {rule!r}; expected one of {', '.join(RULES)}{nearest(rule, RULES)}")
    adapters = [add_license(adapter, license) for folder in folders for adapter in find_adapters(folder)]
    if not adapters:
        raise ValueError("a set needs at least one adapter")
    first = adapters[0]
    guided = guidance_of(first, guidance, guidance_scale)
    mixed = [make_oracle(add_license(find_adapter(folder), license), adapters) for folder in oracles]
    all_adapters = [*adapters, *(oracle.adapter for oracle in mixed)]
    for adapter in all_adapters[1:]:
        if adapter.name in [a.name for a in all_adapters if a is not adapter]:
            raise ValueError(f"two adapters are named {adapter.name!r}; train one under another --objective_name")
        check_same(adapter, first)
    known: dict[str, Any] = {}  # all that the adapters record of their base; of what several record, that of the first
    for adapter in reversed(all_adapters):
        known |= {key: value for key, value in adapter.base.items() if value is not None}
    if len({adapter.base.get("resolution") for adapter in all_adapters}) > 1:
        known.pop("resolution", None)  # images have the base's own then
    if base_license is not None:
        known["license"] = base_license
    if base:
        known |= {"name_or_path": base, "revision": None}
    created = AdapterSet(
        base=known,
        adapters=tuple(adapters),
        base_schedule=base_schedule or EtaSchedule(eta=1.0),
        guidance=guided.source,
        guidance_scale=guided.scale,
        num_inference_steps=max(adapter.num_inference_steps for adapter in adapters),
        default_weights={adapter.name: 1 / len(adapters) for adapter in adapters},
        default_rule=rule or training_of(adapters).rule,
        oracles=tuple(mixed),
        versions={name: version(name) for name in PACKAGES},
    )
    with atomic_output_dir(output, ours=set_files, check=load_set) as temporary:
        copies = created.map_adapters(lambda adapter: copy_adapter(adapter, temporary / adapter.name, half=half))
        save_manifest(temporary, copies)
    return load_set(output, read_weights=False)


def guidance_of(adapter: Adapter, source: str | None, scale: float | None) -> Guidance:
    """The guidance of a set with these arguments, by default that of the adapter's training."""
    if source not in (None, "off") and scale is None and adapter.guidance == "off":
        raise ValueError(
            f"guidance {source} needs guidance_scale too, for {adapter.name!r} was trained without guidance"
        )
    if source == "embedded" != adapter.guidance:
        check_embeds_guidance(adapter.base)
    guidance = Guidance(source=source or adapter.guidance, scale=adapter.guidance_scale if scale is None else scale)
    if guidance.source == "off" and scale is not None:
        raise ValueError(f"guidance_scale {scale:g} and guidance off; give a guidance, or no scale")
    return guidance


def check_set_output(output: Path, *, overwrite: bool) -> None:
    """Raise ValueError for a folder that is not empty, unless `overwrite`, and for files that no set may hold in it."""
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
    shown = [name for name in SHOWN if name != CARD or is_card(folder / CARD)]
    return files_named(folder, MANIFEST, *shown, *(Path(name, WEIGHTS) for name in names))


def find_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter's folder, as training writes it, or one adapter of a set by its subfolder."""
    folder = Path(folder)
    if not (folder / OBJECTIVE).exists() and (folder.parent / MANIFEST).is_file():
        for adapter in read_manifest(set_folder(folder.parent)).all_adapters:
            if adapter.folder.name == folder.name:
                check_adapter(adapter)
                return adapter
    return read_adapter(folder)


def find_adapters(folder: str | Path) -> list[Adapter]:
    """The adapters of a folder: one, or those of a run with several objectives, in the order of these."""
    inner = [path.parent for path in sorted(Path(folder).glob(f"*/{OBJECTIVE}"))]
    if (Path(folder) / OBJECTIVE).exists() or not inner:
        return [find_adapter(folder)]
    found = {adapter.name: adapter for adapter in map(read_adapter, inner)}
    records = [adapter.record for adapter in found.values()]
    known: list[Mapping[str, Any]] = [record.get("joint") or record.get("distilled") or {} for record in records]
    if not all(known) or len({record.get("config_sha256") for record in records}) > 1:
        raise ValueError(f"{folder} has adapters of several runs, {', '.join(found)}; give each folder by itself")
    names = known[0].get("objectives", list(found))
    if set(names) != set(found):
        missing = f"{folder} has adapters {', '.join(found)}, and its run trained {', '.join(names)}"
        raise ValueError(f"{missing}; train again")
    return [found[name] for name in names]


def add_adapter(folder: str | Path, source: str | Path) -> AdapterSet:
    """Add an adapter to a set; the default weights become equal.

    Raises:
        ValueError: for a name that is taken, another base or guidance, and a set that cannot be written.
    """
    loaded, folder = load_set(folder), check_writable(folder)
    adapter, first = find_adapter(source), loaded.adapters[0]
    if adapter.name in [known.name for known in loaded.all_adapters] or (folder / adapter.name).exists():
        raise ValueError(f"set {folder} has {adapter.name!r} already; choose another name")
    if (adapter.guidance, adapter.guidance_scale) == (loaded.guidance, loaded.guidance_scale):
        first = replace(first, guidance=loaded.guidance, guidance_scale=loaded.guidance_scale)
    check_same(adapter, first)
    shown = {Path(name) for name in SHOWN}  # they stay
    with atomic_output_dir(folder, ours=lambda folder: set_files(folder) - shown, check=load_set) as temporary:
        changed = loaded.map_adapters(lambda known: copy_adapter(known, temporary / known.folder.name))
        adapters = (*changed.adapters, copy_adapter(adapter, temporary / adapter.name))
        weights = {known.name: 1 / len(adapters) for known in adapters}
        save_manifest(temporary, replace(changed, adapters=adapters, default_weights=weights))
    return load_set(folder, read_weights=False)


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
        copies = loaded.map_adapters(lambda adapter: copy_adapter(adapter, temporary / adapter.folder.name))
        for file in (MANIFEST, *SHOWN):
            if (source / file).is_file():
                shutil.copyfile(source / file, temporary / file)
        if [copy.sha256 for copy in copies.all_adapters] != [adapter.sha256 for adapter in loaded.all_adapters]:
            values = read_json(source / MANIFEST, "the manifest of an adapter set")
            for entry, copy in zip(adapter_entries(values), copies.all_adapters, strict=True):
                entry["weights"] = weights_to_dict(copy)
            write_json(temporary / MANIFEST, values)
    return load_set(output, read_weights=False)


def check_same(adapter: Adapter, first: Adapter) -> None:
    """Raise ValueError for adapters of different bases, noise paths or guidance."""
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
