"""A set of two adapters on a tiny pipeline, and a configuration that evaluates it."""

from pathlib import Path

import pandas as pd

from stepfuse.fuse.diffusion.variance import EtaSchedule
from stepfuse.fuse.sets.create import create_set
from tests.fixtures_tiny import save_adapter, save_stable_diffusion

PROMPTS = ["a red apple on a blue background", "a fox on a green background", "a cat on a pink background"]
CONFIG = dict(
    prompts="prompts.txt",
    seeds_per_prompt=2,
    grid=2,
    rules=[
        "product",
        "systematic",
        {"rule": "kl", "strengths": [0.5]},
        {"rule": "code", "candidates": 2, "block_size": 2},
    ],
    rewards=["emoji_background"],
    scales={"a": 5.0, "b": 0.2},
    steps=3,
    batch_size=4,
    strip_prompts=1,
)

MEASURED = CONFIG | dict(
    rules=["product", CONFIG["rules"][-1]], rewards=[], judges=["emoji_background"], scales={"a": 5.0}
)


def save_desk(folder: Path) -> Path:
    """Two sets of two adapters, one of them with an oracle at the middle, and prompts."""
    base = save_stable_diffusion(folder / "base")
    rewards = {
        "a": "colourfulness",
        "b": "compressibility",
        "mix": "weighted:1*colourfulness/5 + 1*compressibility/0.2",
    }
    for seed, (name, reward) in enumerate(rewards.items()):
        schedule = EtaSchedule(eta=0.5 + 0.2 * seed)
        save_adapter(folder / name, base, name, seed=seed, variance=schedule, reward=reward, guidance="off")
    create_set(folder / "set", [folder / "a", folder / "b"], oracles=[folder / "mix"])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    create_set(folder / "plain", [folder / "a", folder / "b"])
    return folder


def table(output: Path) -> pd.DataFrame:
    return pd.read_parquet(output / "results.parquet")


def without_costs(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=["seconds", "peak_memory_mb"])
