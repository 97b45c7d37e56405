"""The training loop of all stages of the embedded emoji base."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class Stage:
    steps: int
    batch_size: int
    learning_rate: float


STAGES = {
    "vae": Stage(steps=1500, batch_size=24, learning_rate=2e-3),
    "clip": Stage(steps=700, batch_size=96, learning_rate=6e-4),
    "unet": Stage(steps=4000, batch_size=64, learning_rate=8e-4),
}


def fit(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss: Callable[[torch.Generator], Tensor],
    *,
    folder: Path,
    steps: int,
    seed: int,
    ema_decay: float = 0.998,
) -> dict[str, dict[str, Tensor]]:
    """AdamW with warm-up, a constant rate, linear decay over the last quarter, and an exponential average of weights.

    A checkpoint is written every 200 steps.

    Returns:
        The averaged state dict of each module.
    """
    learning_rate = STAGES[name].learning_rate
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {key: {k: v.clone() for k, v in m.state_dict().items()} for key, m in modules.items()}
    start, seconds = 0, 0.0
    file = folder / f"{name}.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
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
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema_decay, (step + 1) / (step + 10))
        for key, module in modules.items():
            for k, v in module.state_dict().items():
                if v.is_floating_point():
                    average[key][k].lerp_(v, 1 - decay)
        running = 0.98 * running + 0.02 * value.item()
        bar.set_postfix(loss=f"{running / (1 - 0.98 ** (step - start + 1)):.4f}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {key: module.state_dict() for key, module in modules.items()}
            seconds = time.monotonic() - begun
            torch.save(
                {"modules": state, "optimizer": optimizer.state_dict(), "average": average}
                | {"step": step + 1, "seconds": seconds},
                file.with_suffix(".tmp"),
            )
            file.with_suffix(".tmp").rename(file)
    return average


def averaged(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / f"{name}.pt", weights_only=True)["average"]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)
