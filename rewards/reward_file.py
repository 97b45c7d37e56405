"""Reward files in YAML: a named reward with another precision or scale, a worker, or a server."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from stepfuse.data.settings_fields import check_settings
from stepfuse.data.settings_file import check_names, check_types, read_settings, require
from stepfuse.rewards.over_http import HTTPReward, HTTPSettings
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.rewards.shaping import Shaped, Shaping
from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings


@dataclass(frozen=True, kw_only=True)
class RewardFile:
    """The keys of a reward file. Exactly one of `reward`, `worker` and `http` is given.

    Attributes:
        reward: Name of a reward, as for `--reward`. Paths in it are relative to the working directory.
        worker: Keys of `WorkerSettings`. Paths are relative to the folder of the reward file.
        http: Keys of `HTTPSettings`. Paths are relative to the folder of the reward file.
        dtype: Data type of the networks of `reward`.
        shift, scale, clip: See `Shaping`.
    """

    reward: str = ""
    worker: dict = field(default_factory=dict)
    http: dict = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shift: float = 0.0
    scale: float = 1.0
    clip: list[float] = field(default_factory=list)


def read_reward_file(
    file: Path, load: Callable[[str, torch.device, torch.dtype], Reward], device: torch.device
) -> Reward:
    """Create the reward that a reward file describes; a named reward is loaded by `load`, on this device.

    Raises:
        ValueError: If the file cannot be read, a key is unknown, a value is invalid, or not exactly one of `reward`,
            `worker` and `http` is given. The message names the file.
    """
    values = read_settings(file, RewardFile)
    try:
        settings = RewardFile(**values)
        check_types(settings)
        sources = [name for name in ("reward", "worker", "http") if getattr(settings, name)]
        if len(sources) != 1:
            raise ValueError(f"{' and '.join(sources) or 'no reward'}; expected exactly one of reward, worker and http")
        if parse_reward(settings.reward).kind == "file":
            raise ValueError(f"reward {settings.reward!r} is another reward file; expected a name or a function")
        if settings.dtype != "float32" and not settings.reward:
            raise ValueError(f"dtype {settings.dtype} is given for a worker or server; expected it with reward only")
        shaping = Shaping(shift=settings.shift, scale=settings.scale, clip=settings.clip)
        reward: Reward
        if settings.worker:
            worker = _settings(WorkerSettings, settings.worker, "worker", "function")
            reward = WorkerReward(worker, name=file.stem, folder=file.parent)
        elif settings.http:
            http = _settings(HTTPSettings, settings.http, "http", "url")
            reward = HTTPReward(http, folder=file.parent)
        else:
            reward = load(settings.reward, device, getattr(torch, settings.dtype))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return reward if shaping == Shaping() else Shaped(reward, shaping, file.stem)


def _settings(settings_class: type, values: dict[str, Any], key: str, required: str) -> Any:
    """Create settings from the values of a key, and check them."""
    try:
        check_names(values, settings_class)
        require(required in values, required, None, "a value")
        settings = settings_class(**values)
        check_settings(settings)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return settings
