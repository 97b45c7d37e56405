"""Loading base models as diffusers pipelines."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiffusionPipeline

from stepfuse.data import emoji
from stepfuse.data.library_messages import LIBRARIES, quiet_loading
from stepfuse.data.names import near_names, suggestion
from stepfuse.data.near_folders import near_folders
from stepfuse.data.stages import stage
from stepfuse.fuse.backbones.base import RESOLUTION, Backbone
from stepfuse.fuse.backbones.flow import LENGTH
from stepfuse.fuse.backbones.registry import backbone_class
from stepfuse.fuse.backbones.weight_files import check_complete, component_variants, file_names, only_variant
from stepfuse.fuse.lora.names import LayerNames

INPUTS = {
    "max_sequence_length": LENGTH,
    "resolution": RESOLUTION,
}  # what a base records beside its weights: key in the configuration
IGNORED_PARTS = ("safety_checker", "image_encoder", "feature_extractor")  # of pipelines, when they are loaded

logger = logging.getLogger(__name__)


def load_pipeline(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    max_sequence_length: int | None = None,
    resolution: int | None = None,
    safe: bool = False,
    **options: Any,
) -> DiffusionPipeline:
    """Load a pipeline of one of the families in `BACKBONES` from the hub, a folder, or the package (`emoji.BASES`).

    Safety checkers and invisible watermarks are not loaded: rewards see every image as it was drawn. Everything else in
    its configuration is supported or refused, see `Backbone.check`.

    Args:
        name_or_path: as for `DiffusionPipeline.from_pretrained`, or `emoji` or `emoji-flow`.
        dtype: of every component.
        revision: a branch, tag or commit on the hub.
        variant: of the weight files, `fp16` for instance. Where there are files of one variant only, it is found.
        max_sequence_length: tokens of a prompt, for families that pad prompts and attend to the padding; by default
            what the base's model_index.json states, or else the default of its pipeline.
        resolution: height and width in pixels of its images where none are given; by default its own.
        safe: take weights in safetensors only, as is right for bases that are named by other people's sets.
        options: passed on to `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: for a pipeline of another family or with an unsupported configuration, a folder without one, and
            weights that are not there in this variant.
    """
    stage(f"Loading the base model {name_or_path} …")
    path = stored_at(name_or_path)
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
    except OSError as error:
        near = near_folders(Path(name_or_path), lambda folder: (folder / "model_index.json").is_file())
        near = near_names(name_or_path, emoji.BASES)[:1] or near
        raise ValueError(
            f"no diffusers pipeline at {name_or_path!r}: expected a hub id, a folder with model_index.json, relative "
            f"to {Path.cwd()} unless it is absolute, or one of {', '.join(emoji.BASES)}"
            f"{suggestion(near)} ({str(error).splitlines()[0]})"
        ) from error
    options = {k: v for k, v in options.items() if v is not None} | {"dtype": dtype, "revision": revision}
    if safe:
        options |= {"use_safetensors": True}
    try:
        family = backbone_class(str(index.get("_class_name")))
        options |= family.load_options(index)
        with quiet_loading(progress=name_or_path not in emoji.BASES):
            try:
                pipeline = DiffusionPipeline.from_pretrained(path, variant=variant, **options)
            except (OSError, ValueError, NotImplementedError) as error:
                found = _other_variant(path, index, variant, error, options)
                logger.warning("%r has weights under variant %s only, which is loaded", name_or_path, found)
                pipeline = DiffusionPipeline.from_pretrained(path, variant=found, **options)
        check_complete(pipeline, path, revision, options)
        length = max_sequence_length or index.get("max_sequence_length")
        register_inputs(pipeline, max_sequence_length=length, resolution=resolution)
        backbone = family(pipeline)
        if resolution:
            check_resolution(backbone, resolution)
        backbone.check()
        backbone.check_can_encode()
    except ValueError as error:
        raise ValueError(f"{name_or_path!r} cannot be loaded: {error}") from error
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipeline


def check_resolution(backbone: Backbone, resolution: int) -> None:
    """Check that a base can draw images of this height and width."""
    try:
        backbone.size(resolution, resolution)
    except ValueError as error:
        raise ValueError(f"resolution {resolution} is not one of this base: {error}") from error


def register_inputs(pipeline: DiffusionPipeline, **values: int | None) -> None:
    """Set what `INPUTS` names, in the pipeline's configuration: backbones of this pipeline take it as their default."""
    changed = {INPUTS[name]: value for name, value in values.items() if value != pipeline.config.get(INPUTS[name])}
    pipeline.register_to_config(**changed)


def stored_at(name_or_path: str) -> str:
    """The folder of a bundled base; other names as they are."""
    return str(emoji.BASES.get(name_or_path, name_or_path))


def _other_variant(
    path: str, index: Mapping[str, Any], variant: str | None, error: Exception, options: Mapping[str, Any]
) -> str:
    """The only variant that there are weights of, where a pipeline could not be loaded under none."""
    safe = bool(options.get("use_safetensors"))
    parts = [part for part in index if part not in IGNORED_PARTS]
    found = component_variants(file_names(path, options["revision"]), parts, safe=safe)
    known = sorted({str(other) for variants in found.values() for other in variants - {None}})
    if variant is not None and variant not in known:
        raise ValueError(f"it has no weights under variant {variant!r}; it has {', '.join(known) or 'no variants'}")
    other = only_variant(found) if variant is None else None
    if other is None:
        raise ValueError(f"{str(error).strip().splitlines()[0]}{' (from safetensors)' * safe}") from error
    return other


def load_base(base: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load the base that an adapter or a set names, as it records it, from safetensors only."""
    recorded = {name: base.get(name) for name in ("revision", "variant", *INPUTS)}
    return load_pipeline(base["name_or_path"], dtype=dtype, safe=True, **recorded)


def layer_names(base: Mapping[str, Any]) -> LayerNames:
    """Names of a base's layers in other tools' files, by its configuration; a ValueError where that is not found."""
    family, config = _network_config(base)
    return family.names(config)


def check_embeds_guidance(base: Mapping[str, Any]) -> None:
    """Check, by its configuration, that the network of a base takes the guidance scale as an input."""
    _, config = _network_config(base)
    if not config.get("guidance_embeds"):
        raise ValueError(
            f"guidance embedded, but the network of base {base['name_or_path']!r} does not take the guidance scale as "
            "an input; expected one of shared, full, off"
        )


def _network_config(base: Mapping[str, Any]) -> tuple[type[Backbone], Mapping[str, Any]]:
    name, revision = base["name_or_path"], base.get("revision")
    path = stored_at(name)
    try:
        family = backbone_class(DiffusionPipeline.load_config(path, revision=revision)["_class_name"])
        return family, AutoModel.load_config(path, subfolder=family.part, revision=revision)
    except OSError as error:
        raise ValueError(f"the configuration of base {name!r} cannot be had: {str(error).splitlines()[0]}") from error


def quiet_libraries() -> None:
    """For programs: diffusers and transformers report errors only, and load without progress bars."""
    for library in LIBRARIES:
        library.set_verbosity_error()
        library.disable_progress_bar()
