"""What a reward is called by: how it is made, and what there is to know of it before: `stepfuse reward list`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.published import Published
from stepfuse.rewards.worker.environment import COMPLETE, environment_folder

Build = Callable[[str | None, torch.device, torch.dtype], Reward]


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """One reward, and its line of the list.

    Attributes:
        build: from what follows the name's colon, a device and a precision.
        source: the paper, or where it comes from.
        licence: of the weights, or of the code where there are none.
        differentiable: in the pixels, so that `rgg` can use it.
        unit: of its values, as axes and tables name it.
        weights: bytes of its networks in memory, in float32.
        files: what is downloaded at first use.
        requirements: of the environment that is made at first use.
        needs: what has to be given.
    """

    build: Build
    source: str
    licence: str
    differentiable: bool
    unit: str = ""
    weights: int = 0
    files: tuple[Published, ...] = ()
    requirements: Path | None = None
    needs: str = ""

    @property
    def download(self) -> int:
        """Bytes at first use, where they are published; an environment's packages not counted."""
        return sum(file.size for file in self.files)

    def state(self) -> str:
        """Ready, or what will happen at first use."""
        if self.needs:
            return self.needs
        missing = [file for file in self.files if not _cached(file)]
        if missing:
            return f"downloads {size_label(sum(file.size for file in missing))} at first use"
        if self.requirements is not None and not (environment_folder(self.requirements) / COMPLETE).is_file():
            return f"makes an environment of {self.requirements.name} at first use"
        return "ready"


def size_label(size: int) -> str:
    """Bytes as people write them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2g} {name}"
    return f"{size} B" if size else "–"


def table(rewards: dict[str, NamedReward]) -> list[tuple[str, ...]]:
    """Rows of `stepfuse reward list`, its heading first."""
    heading = ("reward", "gradient", "download", "in memory", "at first use", "licence", "source")
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
    return [heading, *rows]


def _cached(file: Published) -> bool:
    return isinstance(try_to_load_from_cache(file.repo, file.name, revision=file.revision), str)
