"""The weights of the objectives that a run trains on."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.train.rollout import sample_generator
from stepfuse.train.settings import TrainSettings


def group_weights(settings: TrainSettings, step: int, groups: int) -> Float[Tensor, "groups objectives"]:
    """The weights of each group of a step, the same on every process: one for a run with one objective.

    Of all groups so far `vertex_share` have their weight on one objective, each in turn; the weights of the others are
    drawn from Dirichlet(α, …, α), α = `weight_concentration`.
    """
    count = len(settings.each)
    weights = torch.ones(groups, count, dtype=torch.float64)
    if count == 1:
        return weights
    for index in range(groups):
        number = step * groups + index
        vertices = math.floor(number * settings.vertex_share)
        if math.floor((number + 1) * settings.vertex_share) > vertices:
            weights[index] = torch.eye(count)[vertices % count]
        else:
            generator = sample_generator(settings.seed, "weights", step, index)
            alpha = torch.full((count,), settings.weight_concentration, dtype=torch.float64)
            drawn = torch._standard_gamma(alpha, generator=generator)
            weights[index] = drawn / drawn.sum()
    return weights


def vertex_of(weights: Sequence[float]) -> int | None:
    """The index of the objective that has all the weight; None for a mixture."""
    (largest, index) = max((weight, index) for index, weight in enumerate(weights))
    return index if largest == 1 else None
