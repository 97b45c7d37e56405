"""The public interface of stepfuse: names that README, cards and documentation use.

They are imported when they are first used, so that `import stepfuse` takes no time and no memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepfuse.fuse.backbones.base import Backbone as Backbone
    from stepfuse.fuse.backbones.conditioning import Conditioning as Conditioning
    from stepfuse.fuse.backbones.registry import BACKBONES as BACKBONES
    from stepfuse.fuse.diffusion.gaussian import Gaussian as Gaussian
    from stepfuse.fuse.diffusion.noise_path import NoisePath as NoisePath
    from stepfuse.fuse.diffusion.noise_path import Time as Time
    from stepfuse.fuse.diffusion.variance import ScheduleOption as ScheduleOption
    from stepfuse.fuse.diffusion.variance import VarianceSchedule as VarianceSchedule
    from stepfuse.fuse.rules.base import FusionRule as FusionRule
    from stepfuse.fuse.rules.registry import RULES as RULES
    from stepfuse.fuse.rules.schedules import SCHEDULES as SCHEDULES
    from stepfuse.fuse.rules.step import FusionStep as FusionStep
    from stepfuse.fuse.sampling.pipeline import FusedPipeline as FusedPipeline
    from stepfuse.fuse.sampling.sampler import FusedSampler as FusedSampler
    from stepfuse.fuse.sets.adapter_set import AdapterSet as AdapterSet
    from stepfuse.fuse.sets.adapter_set import load_set as load_set
    from stepfuse.fuse.sets.create import create_set as create_set
    from stepfuse.rewards.catalogue import REWARDS as REWARDS
    from stepfuse.rewards.protocol import Pixels as Pixels
    from stepfuse.rewards.protocol import Reward as Reward
    from stepfuse.rewards.protocol import Scores as Scores
    from stepfuse.rewards.registry import load_reward as load_reward
    from stepfuse.scripts.evaluation.batch import MetricBatch as MetricBatch
    from stepfuse.scripts.evaluation.metric import Metric as Metric
    from stepfuse.scripts.evaluation.metrics import METRICS as METRICS
    from stepfuse.train.loop import train_adapter as train_adapter
    from stepfuse.train.settings import DDPOSettings as DDPOSettings
    from stepfuse.train.settings import DPOSettings as DPOSettings

    __version__: str

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

__all__ = [
    "BACKBONES",
    "METRICS",
    "REWARDS",
    "RULES",
    "SCHEDULES",
    "AdapterSet",
    "Backbone",
    "Conditioning",
    "DDPOSettings",
    "DPOSettings",
    "FusedPipeline",
    "FusedSampler",
    "FusionRule",
    "FusionStep",
    "Gaussian",
    "Metric",
    "MetricBatch",
    "NoisePath",
    "Pixels",
    "Reward",
    "ScheduleOption",
    "Scores",
    "Time",
    "VarianceSchedule",
    "__version__",
    "create_set",
    "load_reward",
    "load_set",
    "train_adapter",
]


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
