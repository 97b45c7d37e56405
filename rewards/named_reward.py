"""The entry of a named reward: how it is created, and its row in `stepfuse reward list`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from stepfuse.data.file_info import size_label
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.published import Published
from stepfuse.rewards.worker.environment import COMPLETE, environment_folder

Build = Callable[[str | None, torch.device, torch.dtype], Reward]


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward that is loaded by name.

    Attributes:
        build: Function of the argument after the name's colon (or None), a device and a data type that creates it.
        source: The paper or repository it comes from.
        licence: Licence of the weights, or of the code if there are no weights; by default stepfuse's.
        differentiable: Whether it is differentiable in the pixels, as `rgg` requires.
        unit: Unit of its scores, for axes and tables.
        weights: Size of its networks in memory, in bytes of float32.
        files: Files that are downloaded at first use.
        requirements: Requirements file of the environment that is created at first use.
        needs: What the argument after the colon must give, if it is required.
    """

    build: Build
    source: str
    licence: str = "Apache-2.0"
    differentiable: bool = True
    unit: str = ""
    weights: int = 0
    files: tuple[Published, ...] = ()
    requirements: Path | None = None
    needs: str = ""

    @property
    def download(self) -> int:
        """Bytes of `files`. Packages of an environment are not included."""
        return sum(file.size for file in self.files)

    def state(self) -> str:
        """Return "ready", what the argument must give, or what happens at first use."""
        if self.needs:
            return self.needs
        missing = [file for file in self.files if not _is_cached(file)]
        if missing:
            return f"downloads {size_label(sum(file.size for file in missing))} at first use"
        if self.requirements is not None and not (environment_folder(self.requirements) / COMPLETE).is_file():
            return f"creates an environment of {self.requirements.name} at first use"
        return "ready"


def no_argument(reward: Reward) -> Build:
    """The `build` of a reward that takes no argument."""

    def build(argument: str | None, device: torch.device, dtype: torch.dtype) -> Reward:
        if argument:
            raise ValueError(f"this reward takes no argument, got {argument!r}")
        return reward

    return build


def table(rewards: Mapping[str, NamedReward]) -> list[tuple[str, ...]]:
    """Return the rows of `stepfuse reward list`, beginning with the header."""
    header = ("reward", "gradient", "download", "in memory", "at first use", "licence", "source")
    rows = [
        (
            name,
            "yes" if info.differentiable else "no",
            size_label(info.download),
            size_label(info.weights),
            info.state(),
            info.licence,
            info.source,
        )
        for name, info in rewards.items()
    ]
    return [header, *rows]


def _is_cached(file: Published) -> bool:
    return isinstance(try_to_load_from_cache(file.repo, file.name, revision=file.revision), str)
