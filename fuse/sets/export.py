"""Adapters of sets, and mixtures of them, as files of other tools."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepfuse.data.folder_files import files_below
from stepfuse.data.names import nearest
from stepfuse.data.output_file import atomic_file, require_new_file
from stepfuse.data.output_folder import atomic_output_dir, require_empty_dir, resolve_folder
from stepfuse.fuse.backbones.loading import layer_names
from stepfuse.fuse.lora.export import PEFT_CONFIG, PEFT_WEIGHTS, save_kohya, save_lora, save_peft
from stepfuse.fuse.lora.factors import Factors
from stepfuse.fuse.lora.merge import merge_factors
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, WeightSchedule
from stepfuse.fuse.sets.adapter import read_factors
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.manifest import MANIFEST


def export(
    adapter_set: str | Path, objective: str | None, *, form: str, output: Path | None, overwrite: bool = False
) -> Path:
    """Write one adapter of a set, or all of them, in another tool's format; all files are written or none.

    Returns:
        The file, or for peft the folder, of one adapter; of several the folder that holds them.

    Raises:
        ValueError: for an objective that the set does not have, an output that exists or is a file of the set, and
            an adapter that the format cannot hold.
    """
    _check_format(form, ("diffusers", "peft", "kohya"))
    loaded = load_set(adapter_set, read_weights=False)
    adapters = loaded.adapters if objective is None else [a for a in loaded.all_adapters if a.name == objective]
    if not adapters:
        known = [a.name for a in loaded.all_adapters]
        raise ValueError(
            f"set {adapter_set} has no adapter {objective!r}; it has {', '.join(known)}{nearest(objective, known)}"
        )
    is_folder = form == "peft"
    names = [adapter.name if is_folder else f"{adapter.name}.safetensors" for adapter in adapters]
    alone = objective is not None and output is not None  # then the output is the file itself
    output = output or Path(f"{form}-loras")
    if not alone:
        resolve_folder(output)
    for path in [output] if alone else [output / name for name in names]:
        if is_folder:
            require_empty_dir(path, overwrite=overwrite, ours=peft_files)
        else:
            _require_new_lora(path, loaded, overwrite=overwrite)
    if alone:
        with atomic_output_dir(output, ours=peft_files) if is_folder else atomic_file(output) as temporary:
            _save(form, temporary, *read_factors(adapters[0]), loaded.base, title=adapters[0].name)
        return output
    files = [f"{name}/{file}" for name in names for file in (PEFT_WEIGHTS, PEFT_CONFIG)] if is_folder else names
    with atomic_output_dir(output, ours=lambda folder: files_below(folder, *files)) as temporary:
        for adapter, name in zip(adapters, names, strict=True):
            _save(form, temporary / name, *read_factors(adapter), loaded.base, title=adapter.name)
    return output / names[0] if len(names) == 1 else output


def merge(
    adapter_set: str | Path,
    weights: Weights | None,
    output: Path,
    *,
    strength: float = 1.0,
    rank: int | None = None,
    form: str = "diffusers",
    overwrite: bool = False,
) -> tuple[int, float]:
    """Write the soup of a set for these weights as one LoRA.

    Returns:
        Its rank, and the share of the exact soup that a lower rank leaves out.

    Raises:
        ValueError: for weights that make no mixture or change over the steps, a DoRA, and an output that exists.
    """
    _check_format(form, ("diffusers", "kohya"))
    if output.suffix != ".safetensors":
        raise ValueError(f"output {output}; expected a name that ends in .safetensors")
    loaded = load_set(adapter_set, read_weights=False)
    _require_new_lora(output, loaded, overwrite=overwrite)
    given = loaded.default_weights if weights is None else weights
    if any(isinstance(weight, WeightSchedule) for weight in given.values()):
        raise ValueError("weights that change over the steps make no one LoRA; give numbers")
    table = (strength * weight_table([given], loaded.names)[0, :, 0]).tolist()
    loras = [(a.name, weight, *read_factors(a)) for a, weight in zip(loaded.adapters, table, strict=True) if weight]
    if not loras:
        raise ValueError(f"strength {strength:g} leaves nothing to merge")
    merged, error = merge_factors([(name, weight, factors) for name, weight, _, factors in loras], rank)
    title = "_".join(f"{name}-{weight:g}" for name, weight, *_ in loras)
    part = loras[0][2]
    with atomic_file(output) as temporary:
        _save(form, temporary, part, merged, loaded.base, title=title)
    return max(layer.rank for layer in merged.values()), error


def peft_files(folder: Path) -> set[Path]:
    """The files of an adapter that peft or `export` saved in a folder; none where it is not one of theirs."""
    both = files_below(folder, PEFT_WEIGHTS, PEFT_CONFIG)
    return both if len(both) == 2 else set()


def _check_format(form: str, known: Sequence[str]) -> None:
    if form not in known:
        raise ValueError(f"format {form!r}; expected one of {', '.join(known)}{nearest(form, known)}")


def _save(
    form: str, output: Path, part: str, factors: Mapping[str, Factors], base: Mapping[str, Any], *, title: str
) -> None:
    """Write a LoRA of a base as a set describes it; a base whose prediction is not recorded predicts the noise."""
    if form == "diffusers":
        save_lora(output, factors, part)
    elif form == "peft":
        save_peft(output, factors, base["name_or_path"])
    else:
        prediction = (base.get("noise_path") or {}).get("prediction_type", "epsilon")
        save_kohya(output, factors, layer_names(base), title=title, prediction=prediction)


def _require_new_lora(output: Path, loaded: AdapterSet, *, overwrite: bool) -> None:
    """Raise ValueError for an output that exists, unless `overwrite`, and for a file of the set that is read."""
    file = require_new_file(output, overwrite=overwrite)
    folders = [adapter.folder for adapter in loaded.all_adapters]
    of_set = (*(folder / WEIGHTS for folder in folders), folders[0].parent / MANIFEST)
    if file.is_file() and any(other.is_file() and file.samefile(other) for other in of_set):
        raise ValueError(f"output {output} is a file of the set itself, which would be damaged; choose another")
