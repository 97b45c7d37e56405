"""What a type checker sees of `from stepfuse import …`: checked by mypy in scripts/test, on the installed wheel."""

from collections.abc import Callable
from pathlib import Path
from typing import assert_type

from stepfuse import (
    RULES,
    AdapterSet,
    DDPOSettings,
    FusedPipeline,
    FusedSampler,
    FusionRule,
    __version__,
    load_reward,
    load_set,
    train_adapter,
)
from stepfuse.rewards.protocol import Reward

assert_type(load_set("emoji"), AdapterSet)
assert_type(FusedSampler.from_pretrained("emoji"), FusedSampler)
assert_type(FusedPipeline.from_pretrained("emoji"), FusedPipeline)
assert_type(__version__, str)
make_rule: Callable[[], FusionRule] = RULES["soup"]
reward: Reward = load_reward("compressibility")
folder: Path = train_adapter(DDPOSettings())
