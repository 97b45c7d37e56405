"""Where along the denoising steps a policy's KL divergence to the base is spent."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch

from stepfuse.data.kl_steps import KL_PICTURE, StepKL, draw_kl_steps, largest_step
from stepfuse.fuse.diffusion.kl_weights import kl_weights
from stepfuse.train.checkpoints import Progress
from stepfuse.train.setup import Setup
from stepfuse.train.trackers import log_picture

logger = logging.getLogger(__name__)

DOMINANT = 0.9  # share of the weights of all steps


def kl_tag(step_index: int, objective: str = "") -> str:
    """The name that trackers show the KL of a denoising step under, which is counted from 1.

    Args:
        objective: for the images that have all weight on it; by default for all images.
    """
    return f"kl_step/{objective}{'/' if objective else ''}{step_index + 1:02d}"


def vertex_means(sums: Mapping[str, Sequence[Sequence[float]]], learnable: int) -> dict[str, float]:
    """The mean KL over the images that have all weight on one objective, by `kl_tag`; and `kl/NAME`, of all steps.

    Args:
        sums: by objective, and for each denoising step, the sum over these images and their number.
        learnable: the number of steps whose sum `kl/NAME` estimates.
    """
    measured: dict[str, float] = {}
    for name, by_step in sums.items():
        known = {kl_tag(k, name): kl / n for k, (kl, n) in enumerate(by_step) if n}
        measured |= known
        if known:
            measured[f"kl/{name}"] = sum(known.values()) / len(known) * learnable
    return measured


def keep_kl_steps(progress: Progress, measured: Mapping[str, float], count: int, names: Sequence[str]) -> None:
    """Keep what was measured of each of `count` denoising steps; one that was not trained on keeps its value.

    Args:
        names: of the objectives.
    """
    progress.kl_steps = _kept(progress.kl_steps, measured, count, "")
    if len(names) > 1:
        of = progress.vertex_kl_steps
        progress.vertex_kl_steps = {name: _kept(of.get(name, []), measured, count, name) for name in names}


def _kept(before: list[float | None], measured: Mapping[str, float], count: int, name: str) -> list[float | None]:
    before = before if len(before) == count else [None] * count
    now = [measured.get(kl_tag(k, name), math.nan) for k in range(count)]
    return [max(v, 0.0) if math.isfinite(v) else old for v, old in zip(now, before, strict=True)]


def kl_record(setup: Setup, kl_steps: Sequence[float | None]) -> list[StepKL]:
    """The KL of every denoising step with its noise levels, for an adapter's record; empty if it is not measured."""
    if not any(nats is not None for nats in kl_steps):
        return []
    path, like = setup.sampling.denoiser.path, torch.zeros(1, dtype=torch.float64)
    return [
        StepKL(sigma_t=path.at(t, like)[1].item(), sigma_s=path.at(s, like)[1].item(), nats=nats)
        for (t, s), nats in zip(setup.sampling.steps, kl_steps, strict=True)
    ]


def show_kl_steps(setup: Setup, progress: Progress) -> None:
    """Write the picture of the KL by step beside the adapter, and send it to the trackers; none where all are 0."""
    if largest_step(progress.kl_steps):
        alone = {name: steps for name, steps in progress.vertex_kl_steps.items() if largest_step(steps)}
        steps = alone or {setup.settings.title: progress.kl_steps}
        picture = draw_kl_steps({name: kl_record(setup, kl_steps) for name, kl_steps in steps.items()})
        picture.save(setup.output / KL_PICTURE)
        log_picture(setup.accelerator.trackers, progress.step, "kl_steps", picture)


def warn_of_dominant_step(setup: Setup) -> None:
    """Warn of a denoising step of a flow path that outweighs all others in every ratio of densities and in the KL."""
    path, steps, learnable = setup.sampling.denoiser.path, setup.sampling.steps, setup.learnable
    if path.prediction_type != "flow":
        return
    # The dominant step is a matter of the noise path; schedules move it little.
    weights = kl_weights(path, steps, setup.sampling.objectives[0].schedule)
    total = weights[learnable].sum().item()
    largest = max(learnable, key=lambda k: weights[k].item())
    share = weights[largest].item() / total
    if share > DOMINANT and learnable.index(largest) >= 2:  # without it there are still steps to compare
        (t, s), count = steps[largest], len(steps)
        logger.warning(
            "denoising step %d of %d (sigma %.3g to %.3g) carries %.0f %% of the KL weights of the steps to train on: "
            "it alone decides the ratios of densities and the KL divergence; --skip_last_steps %d leaves it out",
            *(largest + 1, count, t, s, 100 * share, count - largest),
        )
