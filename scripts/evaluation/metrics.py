"""The metrics of an evaluation by name: a new one is one file and one line here."""

from collections.abc import Sequence

from stepfuse.scripts.evaluation.cost_metrics import FORWARDS, PEAK_MEMORY, SECONDS
from stepfuse.scripts.evaluation.diversity import DIVERSITY
from stepfuse.scripts.evaluation.kl import KL_TO_BASE
from stepfuse.scripts.evaluation.metric import Metric
from stepfuse.scripts.evaluation.reward_metric import reward_metric

METRICS: dict[str, Metric] = {
    "diversity": DIVERSITY,
    "kl": KL_TO_BASE,
    "nfe": FORWARDS,
    "seconds": SECONDS,
    "peak_memory_mb": PEAK_MEMORY,
}


def all_metrics(rewards: Sequence[str], held_out: Sequence[str] = ()) -> list[Metric]:
    """A metric for each reward, then those of `METRICS`."""
    return [*(reward_metric(name, held_out=name in held_out) for name in rewards), *METRICS.values()]
