"""What one adapter was aligned to."""

import re
from dataclasses import dataclass, field

from torch import nn

from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.rewards.shaping import Shaping

NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What one adapter was aligned to.

    Attributes:
        name: how users call it in their weights; letters, digits, `_` and `-`.
        reward: the reward's name.
        variance: the schedule it was trained with, and is fused with.
        beta: temperature of its KL to the base, in units of the shaped reward; 0 where its training had none.
        shaping: what its reward went through before anything learnt from it.
    """

    name: str
    reward: str
    variance: VarianceSchedule
    beta: float
    shaping: Shaping = field(default_factory=Shaping)

    @property
    def temperature(self) -> float:
        """Its beta in units of the raw reward: r/scale at beta is r at beta · scale.

        Exact for the optimum of E[r/scale] - beta KL. Training by normalised advantages or by pairs does not see the
        scale, which then says in which unit beta is meant; `fit_reward` makes it the reward's deviation.
        """
        return self.beta * self.shaping.scale

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"objective name {self.name!r}; expected letters, digits, '_' and '-'")
        if hasattr(nn.ModuleDict(), self.name):  # where peft keeps adapters by name
            raise ValueError(f"objective name {self.name!r} is an attribute of torch's modules; choose another")
        if not isinstance(self.reward, str):
            raise ValueError(f"objective {self.name!r} has reward {self.reward!r}; expected its name")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"objective {self.name!r} has beta {self.beta}; expected 0 or more")
