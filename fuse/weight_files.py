"""Variants of a pipeline's weight files, such as fp16: which there are, of which component."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

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

    Args:
        ask: ask the hub; otherwise only what is on this machine counts.
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
    files: Iterable[str], components: Iterable[str], *, safe: bool = False
) -> dict[str, set[str | None]]:
    """The variants of each component's weights, None standing for weights under no variant.

    Args:
        files: as `file_names` gives them.
        components: those that matter.
        safe: only safetensors count.
    """
    wanted = set(components)
    found: dict[str, set[str | None]] = {}
    for match in filter(None, map(WEIGHT_FILE.fullmatch, files)):
        if match["component"] in wanted:
            variants = found.setdefault(match["component"], set())
            if match["kind"] == "safetensors" or not safe:
                variants.add(match["variant"])
    return found


def only_variant(found: Mapping[str, set[str | None]]) -> str | None:
    """The variant to load where some components have no other weights; None where all have weights under none.

    Raises:
        ValueError: naming the variants where there are several, and components that have no weights.
    """
    lacking = {name: variants for name, variants in found.items() if None not in variants}
    if not lacking:
        return None
    common = sorted(str(variant) for variant in set.intersection(*lacking.values()))
    if not common:
        raise ValueError(f"there are no weights of {', '.join(lacking)} that go together")
    if len(common) > 1:
        raise ValueError(
            f"there are weights of {', '.join(lacking)} under the variants {' and '.join(common)}; choose one with "
            "variant"
        )
    return common[0]
