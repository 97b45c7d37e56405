"""From rewards to preference pairs or advantages."""

from collections.abc import MutableMapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepfuse.data.devices import to_device

# A weighted sum of z-scores, which are of size 1, that is all smaller is what rounding leaves of rewards that cancel.
CANCELLED = 1e-4


def best_and_worst(
    rewards: Float[Tensor, "batch candidates"], margin: float
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """The best and the worst candidate of each sample, and whether their rewards differ by more than the margin.

    Ties are dropped, and so are samples with a candidate whose reward is not finite.
    """
    winner, loser = rewards.argmax(1), rewards.argmin(1)
    gap = rewards.gather(1, winner[:, None]) - rewards.gather(1, loser[:, None])
    return winner, loser, (gap[:, 0] > margin) & torch.isfinite(rewards).all(1)


def weighted_scores(
    rewards: Float[Tensor, "batch candidates objectives"], weights: Float[Tensor, "batch objectives"]
) -> Float[Tensor, "batch candidates"]:
    """One score for each candidate: Σ w_i z(r_i), each reward normalised among the candidates of its image.

    Of one objective it is the reward itself, whose order the normalisation would not change. Rewards that oppose each
    other under these weights leave equal scores.
    """
    if rewards.shape[-1] == 1:
        return rewards[..., 0]
    centred = rewards - rewards.mean(1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) <= rewards.amin(1, keepdim=True)  # not of NaN, which stays
    centred = torch.where(equal, 0.0, centred)
    normalised = centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-8)
    scores = (normalised * to_device(weights, rewards.device, rewards.dtype)[:, None]).sum(-1)
    return torch.where(scores.abs().amax(1, keepdim=True) > CANCELLED, scores, 0.0 * scores)


def group_advantages(
    rewards: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], *, scale: bool, clip: float
) -> Float[Tensor, " batch"]:
    """A = (r - mean of its group) / (standard deviation of its group), clipped (DDPO, arXiv:2305.13301, section 5).

    Args:
        rewards: of the whole step, of all processes; equal rewards of a group have advantage 0.
        groups: index of the group of each reward: its prompt, or the same for all.
        scale: divide by the standard deviation.
        clip: advantages are clipped to ± this.
    """
    names, index = groups.unique(return_inverse=True)
    zeros = rewards.new_zeros(len(names))
    mean, highest, lowest = (
        zeros.scatter_reduce(0, index, rewards, how, include_self=False) for how in ("mean", "amax", "amin")
    )
    # The mean of equal numbers may be rounded; their deviation is 0 nevertheless.
    centred = torch.where((highest > lowest)[index], rewards - mean[index], 0.0)
    if scale:
        deviation = zeros.scatter_reduce(0, index, centred**2, "mean", include_self=False).sqrt()
        centred = centred / (deviation[index] + 1e-8)
    return centred.clamp(-clip, clip)


def tracked_advantages(
    rewards: Float[Tensor, " batch"],
    prompts: Sequence[str],
    history: MutableMapping[str, list[float]],
    *,
    buffer_size: int,
    min_count: int,
    scale: bool,
    clip: float,
) -> Float[Tensor, " batch"]:
    """A = (r - mean) / (standard deviation + 1e-6), clipped, as `PerPromptStatTracker` of ddpo-pytorch and trl 0.23.1.

    Mean and standard deviation are those of the last `buffer_size` rewards of the prompt, those of this step among
    them; as long as there are fewer than `min_count`, they are those of the whole step.

    Args:
        rewards, scale, clip: as in `group_advantages`.
        prompts: prompt of each reward.
        history: rewards that are remembered, by prompt, the oldest first; it is updated.
    """
    values = rewards.double().cpu()
    advantages = torch.zeros_like(values)
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([name == prompt for name in prompts])
        history[prompt] = [*history.get(prompt, []), *values[rows].tolist()][-buffer_size:]
        remembered = values.new_tensor(history[prompt])
        source = values if len(remembered) < min_count else remembered
        advantages[rows] = values[rows] - source.mean()
        if scale:
            advantages[rows] /= source.std(correction=0) + 1e-6
    return advantages.clamp(-clip, clip).to(rewards)


def decoupled_advantages(
    terms: Float[Tensor, "batch terms"],
    weights: Float[Tensor, " terms"],
    groups: Int[Tensor, " batch"],
    *,
    scale: bool,
    clip: float,
) -> Float[Tensor, " batch"]:
    """A = z(Σ w_i z_g(r_i)): each reward is normalised in its group, and then their weighted sum over all samples.

    A reward that varies much within a prompt then has no more weight than one that varies little (GDPO,
    arXiv:2601.05242, eq. 4 to 7; `normalize_then_sum` of trl).

    Args:
        terms: scores of each reward over the whole step; a positive factor of a column has no effect.
        weights: w_i.
        groups: as in `group_advantages`.
        scale, clip: the same, of the sum.
    """
    normalised = [group_advantages(column, groups, scale=True, clip=float("inf")) for column in terms.unbind(1)]
    total = (torch.stack(normalised, dim=1) * weights.to(terms)).sum(1)
    return group_advantages(total, torch.zeros_like(groups), scale=scale, clip=clip)


def mixed_advantages(
    rewards: Float[Tensor, "batch objectives"],
    weights: Float[Tensor, "batch objectives"],
    groups: Int[Tensor, " batch"],
    *,
    scale: bool,
    clip: float,
) -> Float[Tensor, " batch"]:
    """A = z_g(Σ w_i z_g(r_i)): each reward is normalised in its group, weighted, and the sum normalised in the group.

    As GDPO (arXiv:2601.05242) does, a reward that varies much within a prompt has no more weight than one that varies
    little. The sum is normalised in each group, not over all of them, since groups have different weights; at a vertex,
    where one weight is 1, it is `group_advantages` of that reward, scaled. Rewards that oppose each other under these
    weights leave no advantage.

    Args:
        rewards: of each objective over the whole step; a positive factor of a column has no effect.
        weights: w_i, the same for the samples of a group.
        groups, scale, clip: as in `group_advantages`.
    """
    normalised = [group_advantages(column, groups, scale=True, clip=float("inf")) for column in rewards.unbind(1)]
    total = (torch.stack(normalised, dim=1) * weights.to(rewards)).sum(1)
    names, index = groups.unique(return_inverse=True)
    largest = total.new_zeros(len(names)).scatter_reduce(0, index, total.abs(), "amax")
    total = torch.where((largest > CANCELLED)[index], total, 0.0)
    return group_advantages(total, groups, scale=scale, clip=clip)
