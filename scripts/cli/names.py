"""Names that the commands accept, without importing torch."""

from collections.abc import Iterable
from pathlib import Path

GUIDANCE = ("shared", "full", "off")  # of fuse/backbones/guidance.py, which imports torch


def rule_names() -> Iterable[str]:
    from stepfuse.fuse.rules.registry import RULES

    return RULES


def reward_names() -> Iterable[str]:
    from stepfuse.rewards.catalogue import REWARDS

    return REWARDS


def prompt_set_names() -> Iterable[str]:
    from stepfuse.data.prompts import PROMPT_SETS

    return PROMPT_SETS


def embedded_sets() -> dict[str, Path]:
    from stepfuse.fuse.sets.manifest import EMBEDDED_SETS

    return EMBEDDED_SETS
