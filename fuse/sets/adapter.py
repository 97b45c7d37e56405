"""One aligned adapter: its LoRA, its objective and how it came to be, as a folder.

FOLDER/
  pytorch_lora_weights.safetensors   the LoRA, as `pipe.load_lora_weights` reads it
  objective.json                     name, reward, beta, variance schedule, guidance, base, record
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepfuse.data.json_file import write_json
from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.fingerprint import same_base
from stepfuse.fuse.backbones.registry import parts
from stepfuse.fuse.lora.factors import read_factors, state_factors
from stepfuse.fuse.lora.file import LoRAFile, check_fits, check_parts, open_lora
from stepfuse.fuse.lora.load import adapter_state, put_on
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.lora.tensor_file import open_tensors
from stepfuse.fuse.lora.write import save_lora, scale_to_one
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.sets.entries import Adapter, adapter_from_dict, adapter_to_dict, describe_weights
from stepfuse.fuse.sets.manifest import FORMAT_VERSION, read_versioned

OBJECTIVE = "objective.json"


def write_adapter(
    folder: Path,
    network: nn.Module | None,
    objective: Objective,
    *,
    state: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    base: dict[str, Any],
    guidance: str,
    guidance_scale: float,
    num_inference_steps: int,
    record: dict[str, Any],
    part: str,
    license: str | None = None,
    source: str | None = None,
) -> Adapter:
    """Save the adapter named `objective.name` of a network into a folder; `objective.json` comes last.

    Args:
        state, config: all its tensors in peft's names, and peft's configuration; by default those on the network.
        part: the pipeline's name of the network.
        license, source: see `Adapter`.

    Raises:
        ValueError: for tensors that are empty or not finite: nothing is written then.
    """
    if state is None:
        assert network is not None
        state = adapter_state(network, objective.name)
    for name, value in state.items():
        if value.numel() == 0 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"adapter {objective.name!r}: {name} is empty or not finite; it is not saved")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / WEIGHTS
    config = config or cast(Any, network).peft_config[objective.name].to_dict()
    whole = {k: v.detach().float().contiguous().cpu() for k, v in state.items()}
    save_lora(file, state_factors(file, whole, config), part)
    adapter = Adapter(
        folder=folder,
        objective=objective,
        base=base,
        guidance=guidance,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        sha256=describe_weights(file)["sha256"],
        record=record,
        license=license,
        source=source,
    )
    write_json(folder / OBJECTIVE, {"format_version": FORMAT_VERSION, **adapter_to_dict(adapter)})
    return read_adapter(folder)


def copy_weights(adapter: Adapter, folder: Path, *, half: bool = False) -> None:
    """Copy an adapter's weights, in the layout of `save_lora`; with `half` in float16.

    Raises:
        ValueError: for another file than the recorded one, and for values that float16 cannot hold.
    """
    source = adapter.folder / WEIGHTS
    with open_lora(source, parts()) as lora:
        if lora.as_written and not half:
            shutil.copyfile(source, folder / WEIGHTS)
            if describe_weights(folder / WEIGHTS)["sha256"] != adapter.sha256:
                raise ValueError(f"{source} changed while it was copied, or is not the file that was recorded")
            return
        factors = {name: scale_to_one(layer) for name, layer in read_factors(lora, adapter.sha256).items()}
    if half:
        factors = {name: layer.map(Tensor.half) for name, layer in factors.items()}
    save_lora(folder / WEIGHTS, factors, lora.part)
    with open_tensors(folder / WEIGHTS) as tensors:
        tensors.read(keep=False)  # what float16 cannot hold became infinite


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder.

    Raises:
        ValueError: for a missing or malformed file, weights that are truncated, not finite, or not those recorded.
    """
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


def check_adapter(adapter: Adapter) -> None:
    """Check that an adapter's file is a whole LoRA of a network, of finite numbers, and the one that was recorded.

    The file is opened and read once, a tensor at a time.

    Raises:
        ValueError: naming the file.
    """
    check_size(adapter)
    with open_lora(adapter.folder / WEIGHTS, parts()) as lora:
        _check_rank(adapter, lora)
        check_parts(lora)
        lora.tensors.read(adapter.sha256, keep=False)


def check_size(adapter: Adapter) -> None:
    """Check that an adapter's file is there and of the size that the manifest says; it is not opened.

    Raises:
        ValueError: naming the file.
    """
    file = adapter.folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"no LoRA weights at {file}")
    size = file.stat().st_size
    if adapter.size is not None and size != adapter.size:
        raise ValueError(
            f"{file} is truncated or another file: it has {size:,} bytes and the manifest says {adapter.size:,}; "
            "fetch it again"
        )


def _check_rank(adapter: Adapter, lora: LoRAFile) -> None:
    if adapter.rank is not None and lora.rank != adapter.rank:
        raise ValueError(f"{lora.file} is of rank {lora.rank}, and the manifest says {adapter.rank}; fetch it again")


def load_adapter(backbone: Backbone, adapter: Adapter, fingerprint: dict[str, Any]) -> None:
    """Put an adapter on the base's network under its objective's name, and verify that every tensor arrived.

    The file is opened and read once: its header is checked against the network before a tensor is read, and the tensors
    that are put on the network are those that the recorded hash was compared with.

    Raises:
        ValueError: for an adapter of another base, or with a part that is not of the network, and for weights that are
            not those recorded, not finite, or did not all load.
    """
    if not same_base(adapter.base, fingerprint):
        raise ValueError(
            f"adapter {adapter.name!r} in {adapter.folder} was trained on another base, "
            f"{adapter.base.get('name_or_path')!r}; load that one"
        )
    with open_lora(adapter.folder / WEIGHTS, (backbone.part,)) as lora:
        check_parts(lora)
        check_fits(lora.file, lora.layers[backbone.part], backbone.network)
        _check_rank(adapter, lora)
        put_on(backbone.network, backbone.part, adapter.name, lora, lora.read(adapter.sha256))
