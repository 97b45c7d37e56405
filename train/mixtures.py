"""The weights of the objectives that a run trains on."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.train.rollout import sample_generator
from stepfuse.train.settings import TrainSettings


def group_weights(settings: TrainSettings, rollout: int, groups: int) -> Float[Tensor, "groups objectives"]:
    """The weights of each group of a rollout, the same on every process: one for a run with one objective.

    Of all groups so far `vertex_share` have their weight on one objective, each in turn and as often as its
    `vertex_turns`; the weights of the others are drawn from Dirichlet(α, …, α), α = `weight_concentration`.

    Args:
        rollout: number of rollouts before this one, which is not that of optimiser steps where each has several.
        groups: number of groups in a rollout.
    """
    count = len(settings.each)
    weights = torch.ones(groups, count, dtype=torch.float64)
    if count == 1:
        return weights
    turns = turn_order([each.vertex_turns for each in settings.each])
    for index in range(groups):
        number = rollout * groups + index
        vertices = math.floor(number * settings.vertex_share)
        if math.floor((number + 1) * settings.vertex_share) > vertices:
            weights[index] = torch.eye(count)[turns[vertices % len(turns)]]
        else:
            generator = sample_generator(settings.seed, "weights", rollout, index)
            alpha = torch.full((count,), settings.weight_concentration, dtype=torch.float64)
            drawn = torch._standard_gamma(alpha, generator=generator)
            weights[index] = drawn / drawn.sum()
    return weights


def turn_order(turns: Sequence[int]) -> list[int]:
    """Which objective has each of Σ_i turns_i turns, i as many as turns_i of them, spread evenly.

    Each turn is that of the objective with the smallest (turns it had + 1) / turns_i, as D'Hondt allots seats.
    """
    had, order = [0] * len(turns), []
    for _ in range(sum(turns)):
        order.append(min(range(len(turns)), key=lambda i: (had[i] + 1) / turns[i]))
        had[order[-1]] += 1
    return order
