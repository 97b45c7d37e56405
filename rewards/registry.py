"""Rewards by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from stepfuse.rewards.clip_score import CLIPScore
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.rewards.compressibility import compressibility, incompressibility
from stepfuse.rewards.emoji_background import emoji_background
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.weighted import Weighted, parse_terms


def _clip_score(argument: str | None, device: torch.device) -> Reward:
    return CLIPScore(argument, device) if argument else CLIPScore(device=device)


def _weighted(argument: str | None, device: torch.device) -> Reward:
    return Weighted(parse_terms(argument or ""), lambda name: load_reward(name, device))


def _plain(reward: Reward) -> Callable[[str | None, torch.device], Reward]:
    def build(argument: str | None, device: torch.device) -> Reward:
        if argument:
            raise ValueError(f"this reward takes no argument, got {argument!r}")
        return reward

    return build


REWARDS: dict[str, Callable[[str | None, torch.device], Reward]] = {
    "clip_score": _clip_score,
    "colourfulness": _plain(colourfulness),
    "compressibility": _plain(compressibility),
    "emoji_background": _plain(emoji_background),
    "incompressibility": _plain(incompressibility),
    "weighted": _weighted,
}


def load_reward(name: str, device: str | torch.device = "cpu") -> Reward:
    """A reward by name, `clip_score`; with an argument, `clip_score:openai/clip-vit-large-patch14`;
    a weighted sum of several, `weighted:0.5*compressibility/0.2 + 0.5*clip_score/6`; or a function of one's own,
    `path/to/file.py:function`.

    Raises:
        ValueError: for an unknown name, or a file or function that is not there.
    """
    kind, _, argument = name.partition(":")
    if ".py:" in name and kind != "weighted":
        return _from_file(*name.rsplit(":", 1))
    if kind not in REWARDS:
        raise ValueError(f"no reward {kind!r}; expected one of {', '.join(REWARDS)}, or path/to/file.py:function")
    return REWARDS[kind](argument or None, torch.device(device))


def _from_file(file: str, function: str) -> Reward:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no reward file {file!r}")
    spec = importlib.util.spec_from_file_location(f"stepfuse_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}")
    return getattr(module, function)
