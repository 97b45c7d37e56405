"""Published weights of reward models: downloaded from the hub once, pinned and verified, or read from a folder."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from stepfuse.data.file_info import file_hash


@dataclass(frozen=True, kw_only=True)
class Published:
    """One file of a hub repository at one commit.

    Attributes:
        repo: Repository id, `owner/name`.
        name: Name of the file in the repository.
        revision: Commit hash.
        sha256: Hash of the file. Without it, a large file is verified by the hash that the hub's cache stores.
        size: Approximate size of the file in bytes.
    """

    repo: str
    name: str
    revision: str
    sha256: str | None = None
    size: int = 0


def find_files(files: Sequence[Published], folder: str | Path | None, reward: str) -> list[Path]:
    """Find published files, in their order, in a folder of the user, or in the hub's cache if `folder` is None.

    Files that the cache lacks are downloaded, and those of the cache are verified against the published hash.

    Raises:
        ValueError: If a file is missing and cannot be downloaded, or if its hash differs from the published one. The
            message gives the commands or the address to download the file, for the reward of this name.
    """
    if folder is None:
        return [_download(file, files, reward) for file in files]
    for file in files:
        if not Path(folder, file.name).is_file():
            url = f"https://huggingface.co/{file.repo}/resolve/{file.revision}/{file.name}"
            raise ValueError(f"{folder} has no file {file.name}; download {url} into it")
    return [Path(folder, file.name) for file in files]


@contextmanager
def damage_errors(file: Path, expected: str) -> Iterator[None]:
    """Turn any error of reading a published file into a ValueError that names it and says what it is not."""
    try:
        yield
    except Exception as error:  # the libraries raise many types of exception for damaged files
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is not {expected} ({reason}); delete it and download it again") from error


def load_state(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file, or of a checkpoint by `torch.load(weights_only=True)`, to the CPU.

    Raises ValueError if the file is corrupt, holds anything but tensors, or holds values that are not finite.
    """
    with damage_errors(file, "a readable checkpoint"):
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            with warnings.catch_warnings(action="ignore"):  # about pickle protocols, which are refused
                state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} does not hold a state dict of tensors; expected the published checkpoint")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: tensor {name} has values that are not finite; delete it and download it again")
    return state


def _download(file: Published, files: Sequence[Published], reward: str) -> Path:
    try:
        path = Path(hf_hub_download(file.repo, file.name, revision=file.revision))
    except Exception as error:  # the download libraries raise many types of exception
        commands = [f"hf download {f.repo} {f.name} --revision {f.revision} --local-dir DIR" for f in files]
        raise ValueError(
            f"{file.name} of {file.repo} is not in the hub's cache and cannot be downloaded ({type(error).__name__}). "
            f"On a machine with network access, run `{' && '.join(commands)}` "
            f"({sum(f.size for f in files) / 1e9:.1f} GB), copy DIR to this machine, and use the reward {reward}:DIR"
        ) from error
    # The hub's cache names the blob of a large file by its SHA-256, and that of a small file by a shorter git hash.
    blob = path.resolve().name
    expected = file.sha256 or (blob if len(blob) == 64 else None)
    if expected is not None and file_hash(path) != expected:
        raise ValueError(
            f"{path} differs from the file that {file.repo} published (sha256); delete {path.resolve()} "
            "to download it again"
        )
    return path
