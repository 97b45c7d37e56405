"""Tables of an evaluation, a row an image, written by hand; rewards are divided by their units, 2 and 0.5."""

import json
from collections.abc import Callable

import pandas as pd

from stepfuse.scripts.evaluation.config import Setup
from stepfuse.scripts.evaluation.figures import summarise

SETUP = Setup(
    objectives=(("x", "rx"), ("y", "ry")),
    rewards=("rx", "ry", "rz"),
    scales={"rx": 2.0, "ry": 0.5},
    held_out=("rz",),
    steps=20,
    guidance=4.0,
)
PROMPTS, SEEDS = ("a", "b", "c"), (0, 1)
UNKNOWN = float("nan")


def cell(
    rule: str,
    share: float | None,
    scaled: tuple[float, float] = (0.0, 0.0),
    *,
    strength: float = 1.0,
    own: Callable[[int, int], dict] | None = None,
    prompts: tuple[str, ...] = PROMPTS,
    seeds: tuple[int, ...] = SEEDS,
    **columns: float,
) -> pd.DataFrame:
    """Rows of one cell with the share of x; every image has these scaled rewards, but for what `own` gives it."""
    values = {"reward_rx": 2 * scaled[0], "reward_ry": 0.5 * scaled[1], "reward_rz": 0.0}
    values |= {"kl": UNKNOWN, "diversity": UNKNOWN, "nfe": 40.0, "seconds": 1.0, "peak_memory_mb": UNKNOWN} | columns
    shares = {"w_x": UNKNOWN, "w_y": UNKNOWN} if share is None else {"w_x": share, "w_y": 1 - share}
    label = "" if share is None else f"x={share:g},y={1 - share:g}"
    head = {"rule": rule, "weights": label, **shares, "strength": strength}
    return pd.DataFrame(
        head | {"prompt": prompt, "seed": seed} | values | (own(i, k) if own else {})
        for i, prompt in enumerate(prompts)
        for k, seed in enumerate(seeds)
    )


def figures(*cells: pd.DataFrame, **options: int) -> dict:
    summary = summarise(pd.concat(cells), SETUP, **({"draws": 200} | options))
    json.dumps(summary, allow_nan=False)  # plain values throughout
    return summary


def of(summary: dict, rule: str, share: float = 1.0, strength: float = 1.0) -> dict:
    found = [
        c
        for c in summary["cells"]
        if c["rule"] == rule and c["strength"] == strength and (not c["shares"] or c["shares"]["x"] == share)
    ]
    assert len(found) == 1
    return found[0]


def noisy(rule: str, share: float, point: tuple[float, float], shift: float = 0.0) -> pd.DataFrame:
    """Images whose rewards differ from prompt to prompt by as much in every rule."""
    values = (2 * (point[0] + shift), 0.5 * (point[1] + shift))
    return cell(rule, share, own=lambda i, k: {"reward_rx": values[0] + 2 * i, "reward_ry": values[1] + 0.5 * i})
