"""A reward as a metric."""

from functools import partial

from torch import Tensor

from stepfuse.rewards.protocol import score
from stepfuse.rewards.registry import reward_unit
from stepfuse.scripts.evaluation.batch import MetricBatch
from stepfuse.scripts.evaluation.metric import Figure, Metric, gain, missing, wins


def reward_metric(name: str, *, held_out: bool = False) -> Metric:
    """The mean score of the images, its gain over the base, and the share of images that score more than the base's."""
    unit = f", {reward_unit(name)}" if reward_unit(name) else ""
    note = " (held out: nothing was trained on it)" if held_out else ""
    return Metric(
        name=f"reward_{name}",
        title=name,
        description=f"Mean {name} of the images{unit}; higher is better{note}",
        per_image=partial(_score, name=name),
        path=("rewards", name, "mean"),
        further=(
            Figure(
                path=("rewards", name, "gain"),
                heading=f"{name} gain",
                description=f"Mean of {name} minus the base's at the same prompt and seed{unit}{note}",
                aggregate=gain,
                signed=True,
            ),
            Figure(
                path=("rewards", name, "wins"),
                heading=f"{name} wins",
                description=f"Share of images with a higher {name} than the base's of the same prompt and seed, ties "
                f"half{note}",
                aggregate=wins,
            ),
            Figure(path=("rewards", name, "missing"), aggregate=missing),
        ),
        plotted=False,  # the fronts show the objectives' rewards
    )


def _score(batch: MetricBatch, *, name: str) -> Tensor:
    evaluation = batch.evaluation
    return score(evaluation.rewards[name], batch.pixels.to(evaluation.device), batch.prompts, name=name).cpu()
