"""Where along a path a difference of predictions becomes a KL divergence."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import VarianceSchedule, step_variance


def kl_weights(
    path: NoisePath, steps: Sequence[tuple[Time, Time]], schedule: VarianceSchedule
) -> Float[Tensor, " steps"]:
    """w = (∂m / ∂u)² / (2v): the KL of a step, in nats, per unit of squared difference of the predictions u.

        KL( N(m, v) ‖ N(m', v) ) = |m - m'|² / (2v) = w |u - u'|²

    On a flow path, where u is the velocity, ∂m / ∂u = sqrt(s² - v) (1 - t) - (1 - s) t; there w is about
    t² / (2 r s²) for small s, and a step that ends close to 0 outweighs all others. The log-ratios of two policies, on
    which DDPO and DPO train, have the variance 2w |u - u'|². In float64; 0 for a step without noise, which has no KL.
    """
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    weights = []
    for t, s in steps:
        v = step_variance(schedule, path, t, s, zero).detach()
        slope = transition(path, zero, one, t, s, v).mean
        weights.append(torch.where(v > 0, slope**2 / (2 * v), 0.0).reshape(()))
    return torch.stack(weights)
