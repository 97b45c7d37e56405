"""The denoising steps that are trained on."""

import torch

from stepfuse.fuse.diffusion.variance import step_variance
from stepfuse.train.rollout import Sampling, sample_generator
from stepfuse.train.settings import TrainSettings


def learnable_steps(settings: TrainSettings, sampling: Sampling) -> list[int]:
    """Indices of the denoising steps that can be trained on: random ones, after the first that are skipped."""
    like = torch.zeros(1, 1, 1, 1)
    path, schedule = sampling.denoiser.path, sampling.schedule
    return [
        index
        for index, (t, s) in enumerate(sampling.steps)
        if index >= settings.skip_first_steps and bool((step_variance(schedule, path, t, s, like) > 0).all())
    ]


def learned_steps(settings: TrainSettings, sampling: Sampling, step: int) -> frozenset[int]:
    """`train_timestep_fraction` of the learnable steps, drawn for each rollout, the same on every process.

    Gradients come from some steps only, as in Flow-GRPO-Fast (arXiv:2505.05470) and MixGRPO (arXiv:2507.21802); here
    every step stays random, since fusion needs each transition of the policy.
    """
    indices = learnable_steps(settings, sampling)
    if settings.train_timestep_fraction == 1:
        return frozenset(indices)
    count = max(1, round(settings.train_timestep_fraction * len(indices)))
    drawn = torch.randperm(len(indices), generator=sample_generator(settings.seed, "timesteps", step))
    return frozenset(indices[i] for i in drawn[:count].tolist())
