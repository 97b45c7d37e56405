"""Fusion rules by name. Nothing here imports torch: a rule's module is imported when the rule is first asked for.

Each rule states its equation, its source, its cost in forwards a step, and whether it needs a reward. A forward is one
evaluation of the network on one image; guidance adds the unconditional ones (one a step and image where it is
shared, one to each forward where it is full).
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepfuse.data.names import nearest
from stepfuse.data.registry import Registry
from stepfuse.rewards.user_code import load_function

if TYPE_CHECKING:
    from stepfuse.fuse.rules.base import FusionRule


RULES: "Registry[type[FusionRule]]" = Registry(
    {
        "base": "stepfuse.fuse.rules.product:Base",
        "product": "stepfuse.fuse.rules.product:Product",
        "average_noise": "stepfuse.fuse.rules.averages:AverageNoise",
        "kl": "stepfuse.fuse.rules.product:KL",
        "switch": "stepfuse.fuse.rules.one_expert:Switch",
        "systematic": "stepfuse.fuse.rules.one_expert:Systematic",
        "soup": "stepfuse.fuse.rules.averages:Soup",
        "soup_factors": "stepfuse.fuse.rules.averages:SoupFactors",
        "code": "stepfuse.fuse.rules.best_of_n:CoDe",
        "rgg": "stepfuse.fuse.rules.reward_gradient:RewardGradientGuidance",
        "oracle": "stepfuse.fuse.rules.product:Oracle",
    }
)


def is_user_code(name: str) -> bool:
    """Whether a rule is named as a class of a Python file, `path/to/file.py:Class`."""
    return ".py:" in name


def check_rule_name(name: str) -> None:
    """Check that a rule is in `RULES`, or that its file exists; no code is run. A ValueError has the nearest name."""
    file = name.rpartition(":")[0]
    if name in RULES or (is_user_code(name) and Path(file).is_file()):
        return
    if is_user_code(name):
        raise ValueError(f"no fusion rule {name!r}: no file {file!r}")
    if name.endswith(".py"):
        raise ValueError(f"no fusion rule {name!r}; expected the class too: {name}:CLASS")
    raise ValueError(
        f"no fusion rule {name!r}; expected one of {', '.join(RULES)}, or path/to/file.py:Class{nearest(name, RULES)}"
    )


def get_rule(name: str, /, **options: Any) -> "FusionRule":
    """A rule by its name in `RULES`, or `path/to/file.py:Class`, with its options; ValueError for unknown ones."""
    check_rule_name(name)
    kind = RULES[name] if name in RULES else _load_rule(name)
    fields = _options(kind)
    for option in options:
        if option not in fields:
            owners = [other for other, rule in RULES.items() if option in _options(rule)]
            belongs = f", an option of the rule {' or '.join(owners)}" if owners else ""
            raise ValueError(
                f"rule {name} has no option {option!r}{belongs}; it has {', '.join(fields) or 'none'}"
                f"{nearest(option, fields)}"
            )
    return kind(**options)


def _options(rule: "type[FusionRule]") -> list[str]:
    return [field.name for field in dataclasses.fields(rule)]


def get_default_rule(name: str, /, **options: Any) -> "FusionRule":
    """As `get_rule`, for the default rule of a set, which is never a file: it could run code of a stranger."""
    if is_user_code(name):
        raise ValueError(
            f"the set names {name[:200]!r} as its rule, which is code; choose a rule, such as --rule product"
        )
    return get_rule(name, **options)


def _load_rule(name: str) -> "type[FusionRule]":
    from stepfuse.fuse.rules.base import FusionRule

    file, _, kind = name.rpartition(":")
    rule = load_function(file, kind)
    # A file may hold anything: the one place where a class is tested, before its attributes are relied upon.
    if not (isinstance(rule, type) and issubclass(rule, FusionRule)):
        raise ValueError(f"{name} is not a fusion rule; expected a subclass of stepfuse.FusionRule")
    return rule
