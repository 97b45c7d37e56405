"""Variants of a pipeline's weight files, such as fp16: which there are, of which component."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

# diffusion_pytorch_model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
WEIGHT_FILE = re.compile(
    r"(?P<component>[^/]+)/(diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>[\w-]+?))?"
    r"(-\d{5}-of-\d{5})?\.(?P<kind>safetensors|bin)"
)


def cached_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a pipeline on this machine: its path, or that in the cache of the hub."""
    if Path(path).is_dir():
        return Path(path)
    try:
        index = try_to_load_from_cache(path, "model_index.json", revision=revision)
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def file_names(path: str, revision: str | None, *, ask: bool = True) -> list[str]:
    """The files of a pipeline, relative to its folder or repository; none where they cannot be known.

    With `ask` the hub is asked; otherwise only what is on this machine counts.
    """
    if ask and not Path(path).is_dir():
        try:
            return HfApi().list_repo_files(path, revision=revision)
        except (HFValidationError, OfflineModeIsEnabled, HTTPError, OSError):
            pass  # the cache may know it
    folder = cached_folder(path, revision)
    if folder is None:
        return []
    return [f"{file.parent.name}/{file.name}" for file in folder.glob("*/*") if file.is_file()]


def component_variants(
    files: Iterable[str], components: Collection[str], *, safe: bool = False
) -> dict[str, set[str | None]]:
    """The variants of the weights that components have among these files, None standing for weights under no variant.

    With `safe` only safetensors count.
    """
    matches = [match for match in map(WEIGHT_FILE.fullmatch, files) if match and match["component"] in components]
    found: dict[str, set[str | None]] = {match["component"]: set() for match in matches}
    for match in matches:
        if match["kind"] == "safetensors" or not safe:
            found[match["component"]].add(match["variant"])
    return found


def only_variant(found: Mapping[str, set[str | None]]) -> str | None:
    """The variant to load where some components have no other weights; None where all have weights under none.

    A ValueError names the variants where there are several, and components that have no weights.
    """
    lacking = {name: variants for name, variants in found.items() if None not in variants}
    if not lacking:
        return None
    pickles = [name for name, variants in found.items() if not variants]
    if pickles:
        raise ValueError(
            f"the weights of {', '.join(pickles)} are pickles (.bin); load the pipeline with diffusers and save it "
            "with save_pretrained, which writes safetensors"
        )
    common = sorted(str(variant) for variant in set.intersection(*lacking.values()))
    if not common:
        raise ValueError(f"there are no weights of {', '.join(lacking)} that go together")
    if len(common) > 1:
        raise ValueError(
            f"there are weights of {', '.join(lacking)} under the variants {' and '.join(common)}; choose one with "
            "variant"
        )
    return common[0]


def check_complete(pipeline: DiffusionPipeline, path: str, revision: str | None, given: Collection[str] = ()) -> None:
    """Check that the files of a pipeline held every weight of its components.

    diffusers leaves weights that are missing without values, and transformers initialises them at random. Components
    in `given` were not loaded from there.
    """
    folder = cached_folder(path, revision)
    for name, module in pipeline.components.items():
        if not isinstance(module, nn.Module) or name in given:
            continue
        state = module.state_dict()
        missing = [key for key, value in state.items() if value.is_meta]
        if folder is not None and isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
            stored = {_plain_key(key) for key in _stored_keys(folder / name)}
            missing += [key for key in state if stored and _plain_key(key) not in stored]
        if missing:
            raise ValueError(
                f"the weight files of {name} lack {missing[0]!r} and have {len(state) - len(missing)} of "
                f"{len(state)} weights; fetch or convert the pipeline again"
            )


def _stored_keys(folder: Path) -> set[str]:
    """The keys of the weights in a component's safetensors files."""
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= set(tensors.keys())
        except (SafetensorError, OSError):  # of a variant that was not loaded
            continue
    return found


def _plain_key(key: str) -> str:
    """Without the prefix that transformers 4 writes and transformers 5 leaves out."""
    return key.removeprefix("text_model.")
