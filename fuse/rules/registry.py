"""Fusion rules: from the base and the adapters to the one Gaussian that a step samples.

Each states its equation, its source, its cost in forwards a step, and whether it needs a reward. A forward is one
evaluation of the network on one image; guidance adds the unconditional ones (one a step and image where it is
shared, one to each forward where it is full).
"""

import dataclasses
from typing import Any

from stepfuse.data.names import nearest
from stepfuse.fuse.rules.average_noise import AverageNoise
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.best_of_n import CoDe
from stepfuse.fuse.rules.one_expert import Switch, Systematic
from stepfuse.fuse.rules.product import KL, Base, Oracle, Product
from stepfuse.fuse.rules.reward_gradient import RewardGradientGuidance
from stepfuse.fuse.rules.soup import Soup, SoupFactors

RULES: dict[str, type[FusionRule]] = {
    "base": Base,
    "product": Product,
    "average_noise": AverageNoise,
    "kl": KL,
    "switch": Switch,
    "systematic": Systematic,
    "soup": Soup,
    "soup_factors": SoupFactors,
    "code": CoDe,
    "rgg": RewardGradientGuidance,
    "oracle": Oracle,
}


def get_rule(name: str, **options: Any) -> FusionRule:
    """A rule by its name in `RULES`.

    Args:
        options: fields of the rule, `candidates=8` of `code` for instance.

    Raises:
        ValueError: for a name that is not there, or an option the rule does not have.
    """
    if name not in RULES:
        raise ValueError(f"no fusion rule {name!r}; expected one of {', '.join(RULES)}{nearest(name, RULES)}")
    rule: Any = RULES[name]
    fields = [f.name for f in dataclasses.fields(rule)] if dataclasses.is_dataclass(rule) else []
    for option in options:
        if option not in fields:
            raise ValueError(
                f"rule {name} has no option {option!r}; it has {', '.join(fields) or 'none'}{nearest(option, fields)}"
            )
    return rule(**options)


# What rules have in common --------------------------------------------------------------------
