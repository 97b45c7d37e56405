"""Rewards by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from stepfuse.rewards.catalogue import CONFIGS
from stepfuse.rewards.clip_score import CLIPScore
from stepfuse.rewards.colourfulness import colourfulness
from stepfuse.rewards.compressibility import compressibility, incompressibility
from stepfuse.rewards.emoji_background import emoji_background
from stepfuse.rewards.hpsv2 import HPSv2
from stepfuse.rewards.image_reward import ImageReward
from stepfuse.rewards.laion_aesthetic import LAIONAesthetic
from stepfuse.rewards.over_http import HTTPReward, HTTPSettings
from stepfuse.rewards.pickscore import PickScore
from stepfuse.rewards.protocol import Reward
from stepfuse.rewards.reward_file import read_reward_file
from stepfuse.rewards.weighted import Weighted, parse_terms

Build = Callable[[str | None, torch.device, torch.dtype], Reward]


def _clip_score(argument: str | None, device: torch.device, dtype: torch.dtype) -> Reward:
    return CLIPScore(argument, device) if argument else CLIPScore(device=device)


def _hpsv2_1(argument: str | None, device: torch.device, dtype: torch.dtype) -> Reward:
    return HPSv2(argument, device, dtype, version="2.1")


def _weighted(argument: str | None, device: torch.device, dtype: torch.dtype) -> Reward:
    return Weighted(parse_terms(argument or ""), lambda name: load_reward(name, device, dtype))


def _plain(reward: Reward) -> Build:
    def build(argument: str | None, device: torch.device, dtype: torch.dtype) -> Reward:
        if argument:
            raise ValueError(f"this reward takes no argument, got {argument!r}")
        return reward

    return build


def _shipped(name: str) -> Build:
    def build(argument: str | None, device: torch.device, dtype: torch.dtype) -> Reward:
        if argument:
            raise ValueError(f"this reward takes no argument, got {argument!r}; copy {CONFIGS / name}.yaml and edit it")
        return read_reward_file(CONFIGS / f"{name}.yaml", load_reward, device)

    return build


# What each is, weighs and needs is in catalogue.py, under the same names.
REWARDS: dict[str, Build] = {
    "clip_score": _clip_score,
    "colourfulness": _plain(colourfulness),
    "compressibility": _plain(compressibility),
    "emoji_background": _plain(emoji_background),
    "hpsv2": HPSv2,
    "hpsv2.1": _hpsv2_1,
    "image_reward": ImageReward,
    "image_reward_original": _shipped("image_reward_original"),
    "incompressibility": _plain(incompressibility),
    "laion_aesthetic": LAIONAesthetic,
    "pickscore": PickScore,
    "vila": _shipped("vila"),
    "weighted": _weighted,
}


def load_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """A reward by name, `image_reward`; with an argument, a folder with its weights, `image_reward:weights/`; a
    weighted sum of several, `weighted:0.5*compressibility/0.2 + 0.5*clip_score/6`; a function of one's own,
    `path/to/file.py:function`; a reward file, `path/to/file.yaml`; or a server, `http://127.0.0.1:8765`.

    Args:
        device: where it runs.
        dtype: of networks; scores are float32.

    Raises:
        ValueError: for an unknown name, a file or function that is not there, and weights that cannot be had.
    """
    kind, _, argument = name.partition(":")
    device = torch.device(device)
    if kind in REWARDS:
        return REWARDS[kind](argument or None, device, dtype)
    if kind in ("http", "https"):
        return HTTPReward(HTTPSettings(url=name))
    if ".py:" in name:
        return _from_file(*name.rsplit(":", 1))
    if name.endswith((".yaml", ".yml")):
        return read_reward_file(Path(name), load_reward, device)
    raise ValueError(
        f"no reward {kind!r}; expected one of {', '.join(REWARDS)}, path/to/file.py:function, or path/to/file.yaml"
    )


def _from_file(file: str, function: str) -> Reward:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no reward file {file!r}")
    spec = importlib.util.spec_from_file_location(f"stepfuse_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is anybody's code
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}")
    return getattr(module, function)
