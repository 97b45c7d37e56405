"""The metrics of an evaluation by name: a new one is one file and one line here."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import reward_unit
from stepfuse.scripts.evaluation.batch import MetricBatch
from stepfuse.scripts.evaluation.cost_metrics import FORWARDS, PEAK_MEMORY, SECONDS
from stepfuse.scripts.evaluation.diversity import DIVERSITY
from stepfuse.scripts.evaluation.kl import KL_TO_BASE
from stepfuse.scripts.evaluation.metric import Figure, Metric, gain, missing, wins

METRICS: dict[str, Metric] = {
    "diversity": DIVERSITY,
    "kl": KL_TO_BASE,
    "nfe": FORWARDS,
    "seconds": SECONDS,
    "peak_memory_mb": PEAK_MEMORY,
}


def all_metrics(rewards: Sequence[str]) -> list[Metric]:
    """A metric for each reward, then those of `METRICS`."""
    return [*map(reward_metric, rewards), *METRICS.values()]


def reward_metric(name: str, *, role: str = "") -> Metric:
    """The mean score of the images, its gain over the base, and the share of images that score more than the base's.

    `role` says what the columns call a reward that nothing was trained on, as `role_of` returns it.
    """
    unit = f", {reward_unit(name)}" if reward_unit(name) else ""
    note = f" ({role}: nothing was trained on it)" if role else ""
    title = f"{name} (judge)" if role == "judge" else name

    def scores(batch: MetricBatch) -> Tensor:
        pixels = batch.pixels.to(batch.evaluation.device)
        return score(batch.evaluation.rewards[name], pixels, batch.prompts, name=name).cpu()

    return Metric(
        name=f"reward_{name}",
        title=title,
        description=f"Mean {name} of the images{unit}; higher is better{note}",
        per_image=scores,
        path=("rewards", name, "mean"),
        further=(
            Figure(
                path=("rewards", name, "gain"),
                heading=f"{title} gain",
                description=f"Mean of {name} minus the base's at the same prompt and seed{unit}{note}",
                aggregate=gain,
                signed=True,
            ),
            Figure(
                path=("rewards", name, "wins"),
                heading=f"{title} wins",
                description=f"Share of images with a higher {name} than the base's of the same prompt and seed, ties "
                f"half{note}",
                aggregate=wins,
            ),
            Figure(path=("rewards", name, "missing"), aggregate=missing),
        ),
        plotted=False,  # the fronts show the objectives' rewards
    )


def role_of(name: str, summary: Mapping[str, Any]) -> str:
    """Return `judge` or `held out` for a reward that nothing was trained on; empty for that of an objective."""
    return "judge" if name in summary["judges"] else "held out" if name in summary["held_out"] else ""
