"""The training loop of all stages of the bundled emoji base."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Stage:
    steps: int
    batch_size: int
    learning_rate: float


STAGES = {
    "vae": Stage(steps=1500, batch_size=24, learning_rate=2e-3),
    "clip": Stage(steps=700, batch_size=96, learning_rate=6e-4),
    "unet": Stage(steps=4000, batch_size=64, learning_rate=8e-4),
    "flow_vae": Stage(steps=2400, batch_size=24, learning_rate=2e-3),
    "flow": Stage(steps=10000, batch_size=64, learning_rate=1e-3),
}


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    folder: Path,
    steps: int,
    seed: int,
) -> None:
    """AdamW with warm-up, a constant rate, linear decay over the last quarter, and an exponential average of weights.

    A checkpoint is written every 200 steps.
    """
    learning_rate = STAGES[name].learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    start, seconds = 0, 0.0
    file = folder / f"{name}.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start, seconds = saved["average"], saved["step"], saved["seconds"]
    begun, running = time.monotonic() - seconds, 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=20)
    for step in bar:
        # A generator for each step: a resumed run draws the same numbers as an uninterrupted one.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rate = min(1.0, (step + 1) / 100, (steps - step) / (steps / 4))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        value = loss(generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        for key, weight in model.state_dict().items():
            if weight.is_floating_point():
                average[key].lerp_(weight, 1 - decay)
        running = 0.98 * running + 0.02 * value.item()
        bar.set_postfix(loss=f"{running / (1 - 0.98 ** (step - start + 1)):.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            progress = {"step": step + 1, "seconds": time.monotonic() - begun}
            torch.save({**states, **progress}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)


def load_average(name: str, model: M, folder: Path) -> M:
    """Give a model the averaged weights of its stage, and freeze it."""
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True)["average"])
    return model.eval().requires_grad_(False)


def training_facts(folder: Path, stages: Sequence[str], package: str, seed: int) -> dict[str, Any]:
    """What a model card says of the stages' training, by their checkpoints."""
    facts = {}
    for name in stages:
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        parameters = sum(value.numel() for value in saved["average"].values())
        ran = {"steps": saved["step"], "seconds": saved["seconds"], "parameters": parameters}
        facts[name] = asdict(STAGES[name]) | ran
    return {"package": package, "seed": seed, "torch": torch.__version__, "stages": facts}


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)
