"""The public interface of stepfuse: names that README, cards and documentation use.

They are imported when they are first used, so that `import stepfuse` takes no time and no memory. Type checkers read
their types in `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "AdapterSet": "stepfuse.fuse.sets.adapter_set",
    "BACKBONES": "stepfuse.fuse.backbones.registry",
    "Backbone": "stepfuse.fuse.backbones.base",
    "Conditioning": "stepfuse.fuse.backbones.conditioning",
    "DDPOSettings": "stepfuse.train.settings",
    "DPOSettings": "stepfuse.train.settings",
    "FusedPipeline": "stepfuse.fuse.sampling.pipeline",
    "FusedSampler": "stepfuse.fuse.sampling.sampler",
    "FusionRule": "stepfuse.fuse.rules.base",
    "FusionStep": "stepfuse.fuse.rules.step",
    "Gaussian": "stepfuse.fuse.diffusion.gaussian",
    "METRICS": "stepfuse.scripts.evaluation.metrics",
    "Metric": "stepfuse.scripts.evaluation.metric",
    "MetricBatch": "stepfuse.scripts.evaluation.batch",
    "NoisePath": "stepfuse.fuse.diffusion.noise_path",
    "Pixels": "stepfuse.rewards.protocol",
    "REWARDS": "stepfuse.rewards.catalogue",
    "RULES": "stepfuse.fuse.rules.registry",
    "Reward": "stepfuse.rewards.protocol",
    "SCHEDULES": "stepfuse.fuse.rules.schedules",
    "ScheduleOption": "stepfuse.fuse.diffusion.variance",
    "Scores": "stepfuse.rewards.protocol",
    "Time": "stepfuse.fuse.diffusion.noise_path",
    "VarianceSchedule": "stepfuse.fuse.diffusion.variance",
    "create_set": "stepfuse.fuse.sets.create",
    "load_reward": "stepfuse.rewards.registry",
    "load_set": "stepfuse.fuse.sets.adapter_set",
    "train_adapter": "stepfuse.train.loop",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes more time than the rest of `stepfuse --help`

        value: Any = version("stepfuse")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'stepfuse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
