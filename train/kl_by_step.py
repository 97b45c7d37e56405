"""Where along the denoising steps a policy's KL divergence to the base is spent."""

import logging
import math
from collections.abc import Mapping

import torch

from stepfuse.data.kl_steps import KL_PICTURE, StepKL, draw_kl_steps, largest_step
from stepfuse.fuse.diffusion.kl_weights import kl_weights
from stepfuse.train.checkpoints import Progress
from stepfuse.train.setup import Setup
from stepfuse.train.trackers import log_picture

logger = logging.getLogger(__name__)

DOMINANT = 0.9  # share of the weights of all steps


def kl_tag(step_index: int) -> str:
    """The name that trackers show the KL of a denoising step under, which is counted from 1."""
    return f"kl_step/{step_index + 1:02d}"


def keep_kl_steps(progress: Progress, measured: Mapping[str, float], count: int) -> None:
    """Keep what was measured of each of `count` denoising steps; one that was not trained on keeps its value."""
    before = progress.kl_steps if len(progress.kl_steps) == count else [None] * count
    now = [measured.get(kl_tag(k), math.nan) for k in range(count)]
    progress.kl_steps = [max(v, 0.0) if math.isfinite(v) else old for v, old in zip(now, before, strict=True)]


def kl_record(setup: Setup, progress: Progress) -> list[StepKL]:
    """The KL of every denoising step with its noise levels, for an adapter's record; empty if it is not measured."""
    if not any(nats is not None for nats in progress.kl_steps):
        return []
    path, like = setup.sampling.denoiser.path, torch.zeros(1, dtype=torch.float64)
    return [
        StepKL(sigma_t=path.at(t, like)[1].item(), sigma_s=path.at(s, like)[1].item(), nats=nats)
        for (t, s), nats in zip(setup.sampling.steps, progress.kl_steps, strict=True)
    ]


def show_kl_steps(setup: Setup, progress: Progress) -> None:
    """Write the picture of the KL by step beside the adapter, and send it to the trackers; none where all are 0."""
    if largest_step(progress.kl_steps):
        picture = draw_kl_steps({setup.settings.name: kl_record(setup, progress)})
        picture.save(setup.output / KL_PICTURE)
        log_picture(setup.accelerator.trackers, progress.step, "kl_steps", picture)


def warn_of_dominant_step(setup: Setup) -> None:
    """Warn of a denoising step of a flow path that outweighs all others in every ratio of densities and in the KL."""
    path, steps, learnable = setup.sampling.denoiser.path, setup.sampling.steps, setup.learnable
    if path.prediction_type != "flow":
        return
    weights = kl_weights(path, steps, setup.sampling.schedule)
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
