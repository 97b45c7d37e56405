"""The denoising steps that are trained on."""

import torch

from stepfuse.train.rollout import Sampling, sample_generator
from stepfuse.train.settings import TrainSettings


def learnable_steps(settings: TrainSettings, sampling: Sampling) -> list[int]:
    """Indices of the denoising steps that can be trained on: random ones, after the first that are skipped."""
    like = torch.zeros(1, 1, 1, 1)
    return [
        index
        for index, (t, s) in enumerate(sampling.steps)
        if index >= settings.skip_first_steps and sampling.trains_on(index, sampling.variance(t, s, like))
    ]


def learned_steps(settings: TrainSettings, learnable: list[int], step: int) -> frozenset[int]:
    """`train_timestep_fraction` of the learnable steps, drawn for each rollout, the same on every process.

    Gradients come from some steps only, as in Flow-GRPO-Fast (arXiv:2505.05470) and MixGRPO (arXiv:2507.21802); here
    every step stays random, since fusion needs each transition of the policy.
    """
    count = max(1, round(settings.train_timestep_fraction * len(learnable)))
    drawn = torch.randperm(len(learnable), generator=sample_generator(settings.seed, "timesteps", step))
    return frozenset(learnable[i] for i in drawn[:count].tolist())
