"""What type checkers see of the public interface, whose names `__init__.py` resolves when they are first used."""

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
