"""The entry of a named reward: how it is created, and its row in `stepfuse reward list`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from stepfuse.data.file_info import size_label
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.published import Published
from stepfuse.rewards.worker.environment import environment_folder, is_complete


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward that is loaded by name: a function, a packaged reward file, or what `build` creates.

    Attributes:
        function: The reward itself.
        file: A reward file of a worker; the requirements of its environment are beside it, with the suffix .txt.
        build: Function of the argument after the name's colon (or None), a device and a data type.
        source: The paper or repository it comes from.
        licence: Licence of the weights, or of the code if there are no weights; by default stepfuse's.
        differentiable: Whether it is differentiable in the pixels, as `rgg` requires.
        unit: Unit of its scores, for axes and tables.
        weights: Size of its networks in memory, in bytes of float32.
        files: Files that are downloaded at first use.
        needs: What the argument after the colon must give, if it is required.
        package, extra: Module that it imports, and the extra of stepfuse that installs it, if the core does not.
    """

    function: Reward | None = None
    file: Path | None = None
    build: Callable[[str | None, torch.device, torch.dtype], Reward] | None = None
    source: str
    licence: str = "Apache-2.0"
    differentiable: bool = True
    unit: str = ""
    weights: int = 0
    files: tuple[Published, ...] = ()
    needs: str = ""
    package: str = ""
    extra: str = ""

    @property
    def takes_dtype(self) -> bool:
        """Whether it has networks of torch, which run in other precisions than float32 too."""
        return self.build is not None and self.differentiable

    def state(self) -> str:
        """Return "ready", what the argument must give, what to install, or what the first use does."""
        if self.package and find_spec(self.package) is None:
            return f"needs pip install 'stepfuse[{self.extra}]'"
        cached = [try_to_load_from_cache(file.repo, file.name, revision=file.revision) for file in self.files]
        missing = [file for file, path in zip(self.files, cached, strict=True) if not isinstance(path, str)]
        if missing:
            return f"downloads {size_label(sum(file.size for file in missing))}"
        if self.file is not None and not is_complete(environment_folder(self.file.with_suffix(".txt"))):
            return "creates an environment"
        return self.needs or "ready"


def table(rewards: Mapping[str, NamedReward]) -> list[tuple[str, ...]]:
    """Return the rows of `stepfuse reward list`, beginning with the header."""
    rows: list[tuple[str, ...]] = [("reward", "gradient", "download", "in memory", "at first use")]
    for name, info in rewards.items():
        gradient = "yes" if info.differentiable else "no"
        download = size_label(sum(file.size for file in info.files))  # without packages of an environment
        rows.append((name, gradient, download, size_label(info.weights), info.state()))
    return rows


def sources(rewards: Mapping[str, NamedReward]) -> list[tuple[str, ...]]:
    """Return the rows of `stepfuse reward list --sources`, beginning with the header."""
    return [("reward", "license", "source"), *((name, info.licence, info.source) for name, info in rewards.items())]
