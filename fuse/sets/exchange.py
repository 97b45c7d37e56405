"""LoRAs from elsewhere into sets, and those of sets into files of other tools."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from stepfuse.data.names import nearest
from stepfuse.data.output_folder import check_file, check_output, files_below, replaced, resolve_folder, written_file
from stepfuse.fuse.backbones.fingerprint import describe_base, same_base
from stepfuse.fuse.backbones.loading import EMBEDDED, load_pipeline
from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.lora.convert import read_foreign
from stepfuse.fuse.lora.export import FORMATS, PEFT_CONFIG, PEFT_WEIGHTS, save_kohya, save_peft
from stepfuse.fuse.lora.factors import peft_config, peft_state, read_factors
from stepfuse.fuse.lora.file import check_fits, open_lora
from stepfuse.fuse.lora.merge import merge_factors
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.lora.write import save_lora
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, WeightSchedule
from stepfuse.fuse.sets.adapter import Adapter, check_guidance, write_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet, load_set
from stepfuse.fuse.sets.create import add_adapter, check_writable, create_set
from stepfuse.fuse.sets.hub import fetch_lora, parse_id
from stepfuse.fuse.sets.manifest import MANIFEST

UNKNOWN = "unknown"  # the reward of a LoRA that was not trained on one


def import_lora(
    source: str,
    folder: Path,
    *,
    objective: str,
    eta: float,
    reward: str = UNKNOWN,
    base: str | None = None,
    guidance: str | None = None,
    guidance_scale: float | None = None,
    steps: int | None = None,
    license: str | None = None,
    unet_only: bool = False,
    weight_name: str | None = None,
    variant: str | None = None,
) -> AdapterSet:
    """Put a LoRA from elsewhere into a set, made if it is not there.

    Args:
        source: a safetensors file, a folder as peft saves one, or a hub id.
        folder: of the set.
        objective: its name there.
        eta: of its transitions, which nobody measured: declared.
        reward: what it is meant to raise.
        base: of a set that is to be made.
        guidance: `full` by default, for published LoRAs expect an unconditional prediction of their own; in a set it is
            the set's.
        guidance_scale, steps: by default the set's, or 7.5 and 50.
        license: of its weights.
        unet_only: leave out what is of text encoders.
        weight_name: which file of a repository.
        variant: of the weight files of the base of a set that is to be made, `fp16` for instance.

    Raises:
        ValueError: for a file that is no LoRA of the base, a set it cannot be part of, and a name that is taken.
    """
    exists = (folder / MANIFEST).is_file()
    loaded = load_set(folder) if exists else None
    schedule = EtaSchedule(eta=eta)
    if loaded is not None:
        check_writable(folder)
        if base is not None and base != loaded.base["name_or_path"]:
            raise ValueError(f"set {folder} is of base {loaded.base['name_or_path']!r}; leave out --base")
        if variant is not None and variant != loaded.base.get("variant"):
            raise ValueError(
                f"set {folder} is of the base's variant {loaded.base.get('variant') or 'none'}; leave out --variant"
            )
        wanted = (guidance or "full", loaded.guidance_scale if guidance_scale is None else guidance_scale)
        if wanted != (loaded.guidance, loaded.guidance_scale):
            raise ValueError(
                f"set {folder} has guidance {loaded.guidance} {loaded.guidance_scale:g} and a LoRA from elsewhere "
                f"{wanted[0]} {wanted[1]:g}; a set has one: pass --guidance {loaded.guidance} --guidance_scale "
                f"{loaded.guidance_scale:g} to have it guided so"
            )
        base = loaded.base["name_or_path"]
    elif base is None:
        raise ValueError(f"no set in {folder}; to make one, say of which base: --base OWNER/NAME")
    chosen = check_guidance(guidance or "full")
    known = loaded.base.get("revision") if loaded else None
    variant = loaded.base.get("variant") if loaded else variant
    place = Path(source)
    if not place.exists():
        if parse_id(source) is None:
            raise ValueError(f"no LoRA at {source!r}; expected a safetensors file, a folder of peft's, or a hub id")
        place = fetch_lora(source, weight_name)
    elif weight_name is not None:
        place /= weight_name
    pipeline = load_pipeline(base, revision=known, variant=variant, safe=True)
    described = describe_base(pipeline, base, known, variant=variant)
    if loaded is not None and not same_base(loaded.base, described):
        raise ValueError(f"{base!r} is no longer the base that set {folder} was made of")
    factors = read_foreign(place, pipeline.unet, unet_only=unet_only)
    check_fits(place, factors, pipeline.unet)
    scale = guidance_scale if guidance_scale is not None else loaded.guidance_scale if loaded else 7.5
    with tempfile.TemporaryDirectory() as aside:
        write_adapter(
            Path(aside, objective),
            None,
            Objective(name=objective, reward=reward, variance=schedule, beta=0.0),
            state=peft_state(factors),
            config=peft_config(factors),
            base=described,
            guidance=chosen,
            guidance_scale=scale,
            num_inference_steps=steps or (loaded.num_inference_steps if loaded else 50),
            record={},
            pipeline_class=type(pipeline),
            license=license,
            source=source if parse_id(source) else Path(source).name,
        )
        if loaded is None:
            return create_set(folder, [Path(aside, objective)])
        return add_adapter(folder, Path(aside, objective))


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
    loaded = load_set(adapter_set)
    chosen = loaded.adapters if objective is None else [a for a in loaded.everyone if a.name == objective]
    if not chosen:
        known = [a.name for a in loaded.everyone]
        raise ValueError(
            f"set {adapter_set} has no adapter {objective!r}; it has {', '.join(known)}{nearest(objective, known)}"
        )
    folder, ending = output or Path(f"{form}-loras"), "" if form == "peft" else ".safetensors"
    config, prediction = unet_config(loaded.base), prediction_type(loaded.base)

    def write(adapter: Adapter, place: Path) -> None:
        export_adapter(adapter, place, form=form, config=config, prediction=prediction)

    if objective is not None and output is not None:
        (adapter,) = chosen
        if form == "peft":
            check_output(output, overwrite=overwrite, ours=peft_files)
            with replaced(output, ours=peft_files) as temporary:
                write(adapter, temporary)
        else:
            claim_file(output, loaded, overwrite=overwrite)
            with written_file(output) as temporary:
                write(adapter, temporary)
        return output
    names = [f"{adapter.name}{ending}" for adapter in chosen]
    resolve_folder(folder)
    for name in names:
        if form == "peft":
            check_output(folder / name, overwrite=overwrite, ours=peft_files)
        else:
            claim_file(folder / name, loaded, overwrite=overwrite)

    def ours(there: Path) -> set[Path]:
        if form != "peft":
            return files_below(there, *names)
        return {Path(name, file) for name in names for file in peft_files(there / name)}

    with replaced(folder, ours=ours) as temporary:
        for adapter, name in zip(chosen, names, strict=True):
            write(adapter, temporary / name)
    return folder / names[0] if len(names) == 1 else folder


def peft_files(folder: Path) -> set[Path]:
    """The files of an adapter that peft or `export` saved in a folder; none where it is not one of theirs."""
    both = files_below(folder, PEFT_WEIGHTS, PEFT_CONFIG)
    return both if len(both) == 2 else set()


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
    """Write the soup of a set for these weights as one LoRA; its rank, and the share of the exact one left out.

    Raises:
        ValueError: for weights that make no mixture or change over the steps, a DoRA, and an output that is there.
    """
    if form not in ("diffusers", "kohya"):
        raise ValueError(f"format {form!r}; expected diffusers or kohya{nearest(form, ('diffusers', 'kohya'))}")
    if output.suffix != ".safetensors":
        raise ValueError(f"output {output}; expected a name that ends in .safetensors")
    loaded = load_set(adapter_set)
    claim_file(output, loaded, overwrite=overwrite)
    given = loaded.default_weights if weights is None else weights
    if any(isinstance(weight, WeightSchedule) for weight in given.values()):
        raise ValueError("weights that change over the steps make no one LoRA; give numbers")
    table = (strength * weight_table([given], loaded.names)[0, :, 0]).tolist()
    everyone = [
        (a.name, weight, read_factors(open_lora(a.folder / WEIGHTS), a.sha256))
        for a, weight in zip(loaded.adapters, table, strict=True)
        if weight
    ]
    if not everyone:
        raise ValueError(f"strength {strength:g} leaves nothing to merge")
    merged, error = merge_factors(everyone, rank)
    title = "_".join(f"{name}-{weight:g}" for name, weight, _ in everyone)
    with written_file(output) as temporary:
        if form == "diffusers":
            save_lora(temporary, merged)
        else:
            config, prediction = unet_config(loaded.base), prediction_type(loaded.base)
            save_kohya(temporary, merged, config, title=title, prediction=prediction)
    return max(layer.rank for layer in merged.values()), error


def unet_config(base: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a base's UNet, without its weights.

    Raises:
        ValueError: where it cannot be had.
    """
    name = base["name_or_path"]
    path = str(EMBEDDED.get(name, name))
    try:
        return UNet2DConditionModel.load_config(path, subfolder="unet", revision=base.get("revision"))
    except OSError as error:
        raise ValueError(f"the configuration of base {name!r} cannot be had: {str(error).splitlines()[0]}") from error


def prediction_type(base: dict[str, Any]) -> str:
    """What a base predicts; where it is not recorded the noise, as most do."""
    return (base.get("noise_path") or {}).get("prediction_type", "epsilon")


def claim_file(output: Path, loaded: AdapterSet, *, overwrite: bool) -> None:
    """Check that a file may be written, and is not one of the set that is read.

    Raises:
        ValueError: where one exists, unless `overwrite`, and for the weights and the manifest of the set.
    """
    file = check_file(output, overwrite=overwrite)
    folders = [adapter.folder for adapter in loaded.everyone]
    if file.is_file() and any(
        place.is_file() and file.samefile(place)
        for place in (*(folder / WEIGHTS for folder in folders), folders[0].parent / MANIFEST)
    ):
        raise ValueError(f"output {output} is a file of the set itself, which would be damaged; choose another")


def export_adapter(adapter: Adapter, output: Path, *, form: str, config: Mapping[str, Any], prediction: str) -> None:
    """Write one adapter in another tool's format.

    Args:
        output: a file; for `peft` a folder, which `PeftModel.from_pretrained` reads.
        form: `diffusers`, `peft` or `kohya`.
        config: of the base's UNet; kohya's names depend on it.
        prediction: what the base predicts.

    Raises:
        ValueError: for another format, and an adapter that the format does not hold.
    """
    lora = open_lora(adapter.folder / WEIGHTS)
    factors = read_factors(lora, adapter.sha256)
    if form == "diffusers":
        output.parent.mkdir(parents=True, exist_ok=True)
        save_lora(output, factors)
    elif form == "kohya":
        save_kohya(output, factors, config, title=adapter.name, prediction=prediction)
    elif form == "peft":
        save_peft(output, factors, adapter.base["name_or_path"])
    else:
        raise ValueError(f"format {form!r}; expected one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
