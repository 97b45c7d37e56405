"""Rewards for rules that need them: loaded, in one unit, and differentiable where that is needed."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.lora.mixture import Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.step import Score
from stepfuse.rewards.protocol import Reward, score
from stepfuse.rewards.registry import is_catalogued, load_reward
from stepfuse.rewards.weighted import as_sum

GRADIENT_PROMPT = "a red apple on a blue background"  # any: gradients are there for all prompts or for none


def check_trusted(objective: Objective, *, trusted: bool) -> None:
    """Check that the reward a set names neither runs a stranger's code nor sends images to a stranger's server."""
    if not trusted and not is_catalogued(objective.reward):
        raise ValueError(
            f"the set names {objective.reward[:200]!r} as the reward of {objective.name!r}, which is code or a server; "
            "if you trust it, say so: --trust_rewards, or trust_rewards=True"
        )


def reward_of(
    objective: Objective,
    rule: FusionRule,
    device: torch.device,
    *,
    trusted: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """The reward an objective names, if it may and can be loaded."""
    check_trusted(objective, trusted=trusted)
    try:
        return load_reward(objective.reward, device, dtype)
    except ValueError as error:
        raise ValueError(
            f"rule {rule.name} needs the reward of objective {objective.name!r}: {error}; or pass it as rewards={{…}}"
        ) from error


def score_batch(reward: Reward, name: str, backbone: Backbone, prompts: Sequence[str]) -> Score:
    """A reward as a function of x_0 latents and of which images of the batch they belong to."""

    def score_latents(clean: Latents, images: Rows) -> Float[Tensor, " rows"]:
        return score(reward, backbone.decode(clean), [prompts[i] for i in images.tolist()], name=name)

    return score_latents


def check_scales(used: Sequence[str], scales: Mapping[str, float]) -> None:
    """Check that rewards weighed against each other have units; one alone needs none."""
    unknown = [name for name in used if name not in scales]
    if len(used) > 1 and unknown:
        raise ValueError(
            f"no scale for {unknown[0]!r}, to weigh its reward against the others: its training measured no "
            "deviation; pass reward_scales={…}, or scales in an evaluation's config"
        )


def check_gradients(
    used: Sequence[Objective], rewards: Mapping[str, Reward], rule: FusionRule, device: torch.device
) -> None:
    """Check that the rewards of objectives, and every term of weighted ones, are differentiable, by one small image."""
    for objective in used:
        for name, term in as_sum(rewards[objective.name], objective.reward).rewards.items():
            pixels = torch.full((1, 3, 64, 64), 0.5, device=device, requires_grad=True)
            with torch.enable_grad():
                value = score(term, pixels, [GRADIENT_PROMPT], name=name)
            if not value.requires_grad:
                raise ValueError(
                    f"rule {rule.name} needs gradients, and the reward {name!r} of objective {objective.name!r} has "
                    "none; give it weight 0, or use the rule code"
                )
