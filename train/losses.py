"""Losses on log-probabilities. No loss sees a model; each returns one value per sample."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

PerSample = Float[Tensor, " batch"]


def dpo_loss(
    chosen: PerSample,
    rejected: PerSample,
    reference_chosen: PerSample,
    reference_rejected: PerSample,
    *,
    beta: float | PerSample,
    label_smoothing: float = 0.0,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
    clip_range: float = 0.0,
) -> PerSample:
    """Direct preference optimisation on one denoising step (DPO, arXiv:2305.18290; MSDDA, arXiv:2604.14379).

        h = [log p_θ(x_w|x_t) - log p_ref(x_w|x_t)] - [log p_θ(x_l|x_t) - log p_ref(x_l|x_t)]
        sigmoid:  L = -(1 - ε) log σ(β h) - ε log σ(-β h)
        ipo:      L = (h - 1/(2β))²                              (arXiv:2310.12036)

    With a clip range c > 0 each ratio r = p_θ / p_ref is clamped, so that one beyond the bounds has no gradient
    (SPO, arXiv:2406.04314; `train.eps` of its code, 0.1 there):

        h = log clamp(r_w, 1 - c, 1 + c) - log clamp(r_l, 1 - c, 1 + c)

    Args:
        chosen, rejected: log p_θ of winner and loser, in nats.
        reference_chosen, reference_rejected: log p_ref of the same tensors, in nats.
        beta: temperature of the implied KL, one for all samples or one for each.
        label_smoothing: ε, the assumed share of flipped labels.
        clip_range: c; 0 does not clamp.
    """
    winner, loser = chosen - reference_chosen, rejected - reference_rejected
    if clip_range:
        low, high = math.log1p(-clip_range), math.log1p(clip_range)
        winner, loser = winner.clamp(low, high), loser.clamp(low, high)
    margin = winner - loser
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    agree, disagree = functional.logsigmoid(beta * margin), functional.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * agree - label_smoothing * disagree


def ddpo_loss(log_prob: PerSample, old_log_prob: PerSample, advantage: PerSample, *, clip_range: float) -> PerSample:
    """Clipped importance-weighted policy gradient on one denoising step (DDPO, arXiv:2305.13301, eq. 5; PPO).

        ρ = p_θ(x_s|x_t) / p_old(x_s|x_t),     L = max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε))

    Args:
        log_prob: log p_θ of the stored x_s, in nats.
        old_log_prob: log p_old of the same x_s, when it was drawn.
        advantage: A of the image at the end of the trajectory.
        clip_range: ε.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)
