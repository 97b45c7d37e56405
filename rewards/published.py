"""Published weights: from the hub at first use, pinned and checked, or from a folder of one's own."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Published:
    """One file of a hub repository at one commit.

    Attributes:
        repo: `owner/name`.
        name: the file's.
        revision: the commit.
        sha256: of the file, where it is known; in its place the hub's own for large files.
        size: in bytes, roughly.
    """

    repo: str
    name: str
    revision: str
    sha256: str | None = None
    size: int = 0


def find_files(files: Sequence[Published], folder: str | Path | None, reward: str) -> dict[str, Path]:
    """Where each file lies, by name: in the folder, or in the hub's cache, downloaded if need be.

    Files of the cache are checked against the published hash; those of a folder are its owner's, and are not.

    Raises:
        ValueError: for a file that is not there and cannot be had, with what to download and where to put it, or one
            of the cache whose hash is not what was published.
    """
    if folder is not None:
        return {file.name: _in_folder(file, Path(folder)) for file in files}
    return {file.name: _from_hub(file, files, reward) for file in files}


def load_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a checkpoint by `torch.load(weights_only=True)`, on the CPU.

    Raises:
        ValueError: for a corrupt file, one that holds anything but tensors, or values that are not finite.
    """
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles of other protocols, which fail below
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is truncated or no checkpoint ({reason}); delete it and download it again") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state dict of tensors; expected the published checkpoint")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: tensor {name} has values that are not finite; delete it and download it again")
    return state


def _in_folder(file: Published, folder: Path) -> Path:
    if not (folder / file.name).is_file():
        raise ValueError(f"no {file.name} in {folder}; download {_address(file)} into it")
    return folder / file.name


def _from_hub(file: Published, files: Sequence[Published], reward: str) -> Path:
    try:
        path = Path(hf_hub_download(file.repo, file.name, revision=file.revision))
    except Exception as error:  # the hub's own errors, and those of each way it downloads by
        commands = [f"hf download {f.repo} {f.name} --revision {f.revision} --local-dir DIR" for f in files]
        raise ValueError(
            f"{file.name} of {file.repo} is not in the hub's cache and cannot be downloaded ({type(error).__name__}). "
            f"Where there is a network: `{' && '.join(commands)}` ({sum(f.size for f in files) / 1e9:.1f} GB); "
            f"bring DIR here and say {reward}:DIR"
        ) from error
    # The hub's cache names the blob of a large file by the sha256 that the hub has of it.
    blob = path.resolve().name
    expected = file.sha256 or (blob if len(blob) == 64 else None)
    if expected is not None and _sha256(path) != expected:
        raise ValueError(f"{path} is not the file that {file.repo} published (sha256 differs); delete {path.resolve()}")
    return path


def _address(file: Published) -> str:
    return f"https://huggingface.co/{file.repo}/resolve/{file.revision}/{file.name}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
