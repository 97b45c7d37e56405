"""A reward as a YAML file: a named one in another precision or unit, a worker, or a server."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from stepfuse.data.settings_file import check_names, check_types, read_settings, require
from stepfuse.rewards.over_http import HTTPReward, HTTPSettings
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.shaping import Shaped, Shaping
from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class RewardFile:
    """What a reward file says.

    Attributes:
        reward: a name as `--reward` takes it, paths in it as there; or `worker`, or `http`: one of the three.
        worker: see `WorkerSettings`; its paths are relative to this file.
        http: see `HTTPSettings`; likewise.
        dtype: of the networks of a named reward.
        shift, scale, clip: see `Shaping`.
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
    """The reward of a YAML file.

    Args:
        load: a named reward on a device in a precision.

    Raises:
        ValueError: for a file that cannot be read, an unknown key, naming the nearest, or none or several of the three.
    """
    values = read_settings(file, RewardFile)
    try:
        settings = RewardFile(**values)
        check_types(settings)
        given = [name for name in ("reward", "worker", "http") if getattr(settings, name)]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no reward'}; expected one of reward, worker and http")
        if settings.reward.endswith((".yaml", ".yml")):
            raise ValueError(f"reward {settings.reward!r} is a reward file too; expected a name or a function")
        if settings.dtype != "float32" and not settings.reward:
            raise ValueError(f"dtype {settings.dtype} of a reward in another process; say it there")
        shaping = Shaping(shift=settings.shift, scale=settings.scale, clip=settings.clip)
        reward: Reward
        if settings.worker:
            worker = _settings(WorkerSettings, settings.worker, "worker")
            reward = WorkerReward(worker, name=file.stem, folder=file.parent)
        elif settings.http:
            reward = HTTPReward(_settings(HTTPSettings, settings.http, "http"), folder=file.parent)
        else:
            reward = load(settings.reward, device, DTYPES[settings.dtype])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return reward if shaping == Shaping() else Shaped(reward, shaping, file.stem)


def _settings(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        check_names(values, kind)
        unset = dataclasses.MISSING
        for own in dataclasses.fields(kind):
            needed = own.default is unset and own.default_factory is unset
            require(not needed or own.name in values, own.name, values.get(own.name), "a value")
        settings = kind(**values)
        check_types(settings)
        for name in ("batch_size", "timeout", "start_timeout"):
            require(getattr(settings, name, 1) > 0, name, getattr(settings, name, 1), "a positive number")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return settings
