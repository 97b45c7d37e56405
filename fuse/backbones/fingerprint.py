"""What tells one base model from another."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepfuse.data.file_info import text_hash
from stepfuse.data.text_files import short_repr
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.flow import LENGTH
from stepfuse.fuse.backbones.loading import stored_at
from stepfuse.fuse.backbones.weight_files import cached_folder, component_variants, file_names, only_variant
from stepfuse.fuse.diffusion.noise_path import NoisePath


def base_fingerprint(network: torch.nn.Module) -> dict[str, Any]:
    """What tells one base from another: a hash of names and shapes, and 64 weights to compare within bf16.

    The weights are compared, not hashed, so that one base in float32, float16 and bfloat16 is one base.
    """
    state = {
        name.replace(".base_layer.", "."): value for name, value in network.state_dict().items() if ".lora_" not in name
    }
    names = sorted(state)
    shapes = "\n".join(f"{name} {list(state[name].shape)}" for name in names)
    chosen = [names[i * (len(names) - 1) // 63] for i in range(64)]
    probe = [state[name].flatten()[state[name].numel() // 2].item() for name in chosen]
    return {"architecture": text_hash(shapes), "probe": probe}


def describe_base(
    backbone: Backbone,
    name_or_path: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    hashed: bool = True,
) -> dict[str, Any]:
    """What an adapter's files record of the base it belongs to.

    Its fingerprint tells bases apart whatever their precision. `weights_sha256` is of the network as it was loaded, and
    another in another precision. It is left out unless `hashed`, for it takes seconds of large ones. `variant` is that
    of the weight files, if they are of one.
    """
    variant = variant or _loaded_variant(backbone, name_or_path, revision)
    length, resolution = backbone.pipeline.config.get(LENGTH), backbone.resolution
    folder = cached_folder(name_or_path, revision)
    cached = folder is not None and folder != Path(name_or_path)  # by the hub, in a folder named by the commit
    return {
        "name_or_path": name_or_path,
        "revision": folder.name if folder and cached else revision,
        "weights_sha256": weights_hash(backbone.network) if hashed else None,
        "noise_path": backbone.path().describe(),
        **({"variant": variant} if variant else {}),
        **({"max_sequence_length": length} if length else {}),
        **({"resolution": resolution} if resolution else {}),
    } | base_fingerprint(backbone.network)


def _loaded_variant(backbone: Backbone, name_or_path: str, revision: str | None) -> str | None:
    """The variant that a pipeline was loaded under when none was asked for, by its files on this machine."""
    files = file_names(stored_at(name_or_path), revision, ask=False)
    try:
        return only_variant(component_variants(files, backbone.pipeline.components))
    except ValueError:
        return None


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model without LoRAs."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_path(base: Mapping[str, Any], path: NoisePath) -> None:
    """Check that a noise path is the one an adapter was trained on, where that is recorded.

    Raises:
        ValueError: for another path, and for a flow path whose grid of times is not recorded or another one: adapters
            that were trained on the times that the scheduler has by default are of other steps.
    """
    described, recorded = path.describe(), base.get("noise_path") or {}
    grid = described.get("grid")
    if grid is not None and recorded.get("family", "flow") == "flow" and recorded.get("grid") != grid:
        raise ValueError(
            f"the set's base records {_grid(recorded)} of the times of its flow, and steps are {grid} here; train its "
            f'adapters again, or if they were trained on it add "grid": "{grid}" to base.noise_path in the manifest'
        )
    for key, value in recorded.items():
        if described.get(key) != value:
            raise ValueError(
                f"the scheduler has {key} {described.get(key)!r} and the set's base {value!r}; load the base's own "
                "scheduler"
            )


def _grid(recorded: Mapping[str, Any]) -> str:
    return f"the grid {short_repr(recorded['grid'])}" if "grid" in recorded else "no grid"


def same_base(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one base, up to the rounding of half precision."""
    if a["architecture"] != b["architecture"]:
        return False
    first, second = (torch.tensor(base["probe"], dtype=torch.float64) for base in (a, b))
    return first.shape == second.shape and bool(torch.allclose(first, second, rtol=2**-6, atol=1e-6))
