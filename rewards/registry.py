"""Rewards by name."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepfuse.configs import FOLDER
from stepfuse.data.stages import stage
from stepfuse.rewards.catalogue import REWARDS
from stepfuse.rewards.named_reward import NamedReward
from stepfuse.rewards.over_http import HTTPReward, HTTPSettings
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.reward_file import read_reward_file
from stepfuse.rewards.reward_name import RewardName, check_catalogued, parse_reward
from stepfuse.rewards.user_code import load_function
from stepfuse.rewards.weighted import Weighted

CONFIGS = FOLDER / "rewards"
OWN_DTYPE = {  # by the kind of a reward that has a precision of its own: what it is
    "server": "a server, which is started with a precision",
    "function": "a function, whose code decides its precision",
    "file": "a reward file, which states dtype itself",
}

HPSV3 = NamedReward(
    file=CONFIGS / "hpsv3.yaml",
    source="arXiv:2508.03789, hpsv3 1.0.0 in an environment of its own; it downloads MizzenAI/HPSv3 by itself",
    licence="Apache-2.0 (weights), MIT (code)",
    differentiable=False,
    unit="points",
    weights=33_200_000_000,
)
IMAGE_REWARD_ORIGINAL = NamedReward(
    file=CONFIGS / "image_reward_original.yaml",
    source="image-reward 1.5 in an environment of its own; it downloads 1.8 GB by itself",
    differentiable=False,
    unit="standard deviations",
    weights=1_786_000_000,
)
VILA = NamedReward(
    file=CONFIGS / "vila.yaml",
    source="arXiv:2303.14302, google/vila/image/1 of TensorFlow Hub, which an environment of its own downloads",
    licence="Apache-2.0 by the hub's default",
    differentiable=False,
    unit="0 to 1",
)
WEIGHTED = NamedReward(
    source="a sum of others, weighted:0.5*compressibility/0.2 + 0.5*clip_score/6",
    licence="those of its terms",
    unit="weighted sum",
    needs="its terms",
)


def load_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Load a reward by its name.

    Args:
        name: A name of the catalogue, `image_reward`; with a folder of its weights, `image_reward:weights/`; a weighted
            sum, `weighted:0.5*compressibility/0.2 + 0.5*clip_score/6`; a function, `path/to/file.py:function`; a reward
            file, `path/to/file.yaml`; or a server, `http://127.0.0.1:8765`.
        device: Device that it runs on.
        dtype: Precision of its networks; scores are float32.

    Raises:
        ValueError: for an unknown name, a file or function that does not exist, and weights that cannot be loaded.
    """
    parsed, device = parse_reward(name), torch.device(device)
    match parsed.kind:
        case "server":
            return HTTPReward(HTTPSettings(url=name))
        case "function":
            function = load_function(parsed.path, parsed.argument)
            check_parameters(function, name)
            return function
        case "file":
            return read_reward_file(Path(name), load_reward, device)
        case "sum":
            return Weighted(parsed.terms, lambda term: load_reward(term, device, dtype))
    check_catalogued(parsed)
    entry = REWARDS[parsed.head]
    if entry.build is not None:
        stage(f"Loading the reward {name} …")
        return entry.build(parsed.argument or None, device, dtype)
    if parsed.argument:
        hint = f"; copy {entry.file} and edit it" if entry.file else ""
        raise ValueError(f"this reward takes no argument, got {parsed.argument!r}{hint}")
    if entry.file is not None:
        return read_reward_file(entry.file, load_reward, device)
    assert entry.function is not None
    return entry.function


def check_parameters(function: Callable[..., Any], name: str) -> None:
    """Check by its signature that a reward can be called with images and prompts; a function of C may have none.

    Raises:
        ValueError: for other parameters, and for a class.
    """
    if isinstance(function, type):
        raise ValueError(f"the reward {name!r} is a class; expected a function, or an object of the class")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("images", "prompts")
    except TypeError as error:
        raise ValueError(f"the reward {name!r} takes {signature}; expected (images, prompts)") from error


def check_reward_dtype(names: Sequence[str], dtype: torch.dtype) -> None:
    """Check that networks of rewards can be run in this precision, and that one of these rewards has any.

    Rewards without networks, and such terms of a sum, are computed as they are.

    Raises:
        ValueError: for a worker, a server, a function or a reward file, which have a precision of their own; and where
            no reward has a network. It names the reward.
    """
    if dtype == torch.float32:
        return
    asked = f"reward_dtype {str(dtype).removeprefix('torch.')}"
    parts = [part for name in names for part in summands(name)]
    for part in parts:
        known = REWARDS[part.head] if part.kind == "catalogue" and part.head in REWARDS else None
        if part.kind in OWN_DTYPE or (known is not None and known.file is not None):
            why = OWN_DTYPE.get(part.kind, "a worker, whose code decides its precision")
            raise ValueError(f"{asked}, but the reward {part.text!r} is {why}; leave reward_dtype out")
    if parts and not any(part.head in REWARDS and REWARDS[part.head].takes_dtype for part in parts):
        listed = ", ".join(repr(part.text) for part in parts)
        raise ValueError(f"{asked}, but {listed} has no network that could run in it; leave reward_dtype out")


def reward_unit(name: str) -> str:
    """The unit of a reward's values, such as "kB"; empty if the catalogue does not state one."""
    head = parse_reward(name).head
    return REWARDS[head].unit if head in REWARDS else ""


def summands(name: str) -> list[RewardName]:
    """The rewards of a sum, also of sums in it, or the reward itself; none if a sum is malformed."""
    parsed = parse_reward(name)
    if parsed.kind != "sum":
        return [parsed]
    try:
        return [part for term in parsed.terms for part in summands(term.name)]
    except ValueError:
        return []  # it cannot be loaded


def is_catalogued(name: str) -> bool:
    """Whether a reward, or every term of a sum, is in the catalogue, and so runs no other code and asks no server."""
    return all(part.kind == "catalogue" and part.head in REWARDS for part in summands(name))


def local_parts(name: str) -> list[tuple[str, str]]:
    """The parts of a reward, terms of a sum included, that only its author has: local files and folders, and servers.

    The name of each, and which of these it is.
    """
    what = {"server": "a server", "function": "a local file", "file": "a local file", "catalogue": "a local folder"}
    return [
        (part.text, what[part.kind])
        for part in summands(name)
        if part.kind != "catalogue" or (part.argument and part.head in REWARDS)
    ]
