"""One aligned adapter: its LoRA, its objective and how it came to be, as a folder.

FOLDER/
  pytorch_lora_weights.safetensors   the LoRA, as `pipe.load_lora_weights` reads it
  objective.json                     name, reward, beta, variance schedule, guidance, base, record
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfuse.data.file_info import file_hash
from stepfuse.data.json_file import write_json
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.backbones.registry import parts
from stepfuse.fuse.lora.export import save_lora
from stepfuse.fuse.lora.factors import Factors, put_on, scale_to_one
from stepfuse.fuse.lora.file import LoRAFile, check_fits, open_lora
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.sets.entries import Adapter, adapter_from_dict, adapter_to_dict
from stepfuse.fuse.sets.manifest import FORMAT_VERSION, OBJECTIVE, read_versioned


def write_adapter(adapter: Adapter, factors: Mapping[str, Factors], part: str) -> Adapter:
    """Write an adapter's folder, its LoRA in float32, and return it with the hash; `objective.json` comes last.

    Args:
        factors: by the layer's path in the network.
        part: the pipeline's name of the network.

    Raises:
        ValueError: for tensors that are empty or not finite: nothing is written then.
    """
    file = adapter.folder / WEIGHTS
    for module, layer in factors.items():
        for kind, value in layer.tensors.items():
            if value.numel() == 0 or not bool(torch.isfinite(value).all()):
                what = f"{module}.{kind} is empty or not finite"
                raise ValueError(f"adapter {adapter.name!r}: {what}; it is not saved")
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {module: layer.map(lambda value: value.float().cpu()) for module, layer in factors.items()}
    save_lora(file, stored, part)
    adapter = replace(adapter, sha256=file_hash(file))
    write_json(adapter.folder / OBJECTIVE, {"format_version": FORMAT_VERSION, **adapter_to_dict(adapter)})
    return adapter


def copy_adapter(adapter: Adapter, folder: Path, *, half: bool = False) -> Adapter:
    """Copy the weights of an adapter, which was checked, to a new folder; in another layout they are converted.

    Args:
        half: in float16.

    Returns:
        The adapter with the hash, size and rank of the copy, to be checked against the copy before it is used.

    Raises:
        ValueError: for weights to be converted that are not those recorded.
    """
    folder.mkdir()
    file = folder / WEIGHTS
    with open_lora(adapter.folder / WEIGHTS, parts()) as lora:
        copied = replace(adapter, folder=folder, rank=lora.rank)
        if lora.as_written and not half:
            shutil.copyfile(adapter.folder / WEIGHTS, file)
        else:
            factors = lora.factors(adapter.sha256)
            if half:
                factors = {name: scale_to_one(layer).map(Tensor.half) for name, layer in factors.items()}
            save_lora(file, factors, lora.part)
            copied = replace(copied, sha256=file_hash(file))
    return replace(copied, size=file.stat().st_size)


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder; ValueError for a faulty file, and weights that are not those recorded."""
    folder = Path(folder)
    file = folder / OBJECTIVE
    values = read_versioned(file, "an adapter folder, as training writes it")
    try:
        adapter = adapter_from_dict(folder, values)
    except KeyError as error:
        raise ValueError(f"{file} has no {error.args[0]!r}; train or create the adapter again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    check_adapter(adapter)
    return adapter


def check_adapter(adapter: Adapter, *, read_weights: bool = True) -> None:
    """Check that an adapter's file is a whole LoRA of a network, of finite numbers, and the one that was recorded.

    The file is opened and read once, a tensor at a time.

    Args:
        read_weights: False to check the header and the size alone.

    Raises:
        ValueError: naming the file.
    """
    with open_lora(adapter.folder / WEIGHTS, parts()) as lora:
        _check_recorded(adapter, lora)
        if read_weights:
            lora.tensors.read(adapter.sha256, keep=False)


def read_factors(adapter: Adapter) -> tuple[str, dict[str, Factors]]:
    """The pipeline's name of the network, and the layers; ValueError for weights that are not those recorded."""
    with open_lora(adapter.folder / WEIGHTS, parts()) as lora:
        return lora.part, lora.factors(adapter.sha256)


def load_adapter(backbone: Backbone, adapter: Adapter, fingerprint: dict[str, Any], *, name: str | None = None) -> None:
    """Put an adapter on the base's network, and verify that every tensor arrived.

    The file is opened and read once: its header is checked against the network before a tensor is read, and the tensors
    that are put on the network are those that the recorded hash was compared with.

    Args:
        name: that it gets there; by default its objective's.

    Raises:
        ValueError: for an adapter of another base, or with a part that is not of the network, and for weights that are
            not those recorded, not finite, or did not all load.
    """
    if not same_base(adapter.base, fingerprint):
        raise ValueError(
            f"adapter {adapter.name!r} in {adapter.folder} was trained on another base, "
            f"{adapter.base.get('name_or_path')!r}; load that one in place of {backbone.pipeline.name_or_path!r}, a "
            f"{type(backbone.pipeline).__name__}"
        )
    file = adapter.folder / WEIGHTS
    with open_lora(file, (backbone.part,)) as lora:
        check_fits(file, lora.layers, backbone.network)
        _check_recorded(adapter, lora)
        put_on(backbone.network, name or adapter.name, file, lora.factors(adapter.sha256))


def _check_recorded(adapter: Adapter, lora: LoRAFile) -> None:
    """Check an open file against the size and the rank in the manifest, if the adapter is of a set."""
    file, size = lora.tensors.file, lora.tensors.size
    if adapter.size not in (None, size):
        raise ValueError(
            f"{file} is truncated or another file: it has {size:,} bytes and the manifest says {adapter.size:,}; "
            "fetch it again"
        )
    if adapter.rank not in (None, lora.rank):
        raise ValueError(f"{file} is of rank {lora.rank}, and the manifest says {adapter.rank}; fetch it again")
